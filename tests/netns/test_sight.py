# SPDX-License-Identifier: Apache-2.0
"""What is read again after an apply: that which its steps were about, and that alone."""

from __future__ import annotations

import contextlib
import selectors
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.controller import Controller
from datapath.kernel import observer, sysctl
from datapath.kernel.observer import Sight
from datapath.kernel.rtnl import Rtnl
from datapath.observe.stats import ServiceStats
from datapath.plan.rtnl import FibRule, Route
from datapath.policy import parse_policy
from datapath.reconcile.steps import AddRoute, AddRule, NftTransaction, SetSysctl
from datapath.service.loop import Service
from datapath.service.policy_files import PolicyFiles
from datapath.state import StateDirectory
from tests.netns.nodes import inside, node
from tools.lab.netns import Namespace

pytestmark = pytest.mark.root

POLICY = b"""version: 1
backend: nft
networks:
  - {name: a, interface: eth1, vips: [10.1.1.0/24], gateway: 10.1.1.1}
  - {name: b, interface: eth2, vips: [10.1.2.0/24], gateway: 10.1.2.1}
"""
KEY = "net/ipv4/conf/eth1/rp_filter"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Namespace]:
    with node(4) as made, inside(made.namespace.name):
        Controller(StateDirectory(tmp_path)).apply(parse_policy(POLICY, "policy.yaml"))
        yield made.namespace


def looked() -> tuple[Sight, Route, Route, FibRule]:
    """After a look: a default route of each network, and a rule."""
    sight = Sight()
    routes = {route.device: route for route in sight.routes() if route.gateway}
    sight.table()
    sight.sysctls(frozenset({KEY}))
    rule = min(sight.rules()[0], key=FibRule.sort_key)
    return sight, routes["eth1"], routes["eth2"], rule


@pytest.mark.parametrize("many", [1, 1000])
def test_of_routes_the_tables_of_the_steps(
    served: Namespace, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    """With few routes all are read at once."""
    monkeypatch.setattr(observer, "_ROUTES_MANY", many)
    sight, first, second, _ = looked()
    known = sight.routes()
    for route in (first, second):
        served.run("ip", *route.render().replace("-4", "-4 route del", 1).split())
    sight.touched([AddRoute(first)])
    assert known - sight.routes() == ({first} if many == 1 else {first, second})
    sight.touched([AddRoute(second)])
    assert known - sight.routes() == {first, second}


def test_rules_table_and_sysctls_only_where_steps_were_about_them(served: Namespace) -> None:
    sight, route, _, rule = looked()
    served.run("ip", *rule.render().replace("-4", "-4 rule del", 1).replace("from all", "").split())
    served.nft("flush ruleset")
    served.sysctl({KEY: 2})
    sight.touched([AddRoute(route)])
    assert rule in sight.rules()[0]
    assert sight.table() is not None
    assert sight.sysctls(frozenset())[KEY] == "0"
    sight.touched([SetSysctl(KEY, "0", "1")])
    assert sight.sysctls(frozenset())[KEY] == "2"
    assert rule in sight.rules()[0]
    sight.touched([AddRule(rule), NftTransaction("")])
    assert rule not in sight.rules()[0]
    assert sight.table() is None


def test_sysctls_of_devices_come_with_the_devices_and_are_those_of_their_files(served: Namespace) -> None:
    served.ip(["link set lo mtu 60"])  # no IPv4 below its smallest MTU
    values = {"rp_filter": 2, "arp_ignore": 8, "arp_announce": 1, "accept_local": 1}
    served.sysctl({f"net/ipv4/conf/eth3/{name}": value for name, value in values.items()})
    devices = ("all", "default", "eth1", "eth2", "eth3", "eth4", "lo", "eth9")
    keys = {f"net/ipv4/conf/{device}/{name}" for device in devices for name in values}
    keys |= {"net/ipv6/conf/eth1/keep_addr_on_down", "net/ipv4/tcp_l3mdev_accept"}
    with Rtnl() as rtnl:
        settings = rtnl.devices().settings
    assert settings["eth3"] == {name: str(value) for name, value in values.items()}
    assert settings["lo"] == {}
    assert sysctl.observe(keys, settings) == sysctl.read_all(keys)
    seen = sysctl.observe((), settings)
    assert seen == sysctl.read_all(seen)
    assert {key for key in seen if "rp_filter" in key} == {
        f"net/ipv4/conf/{device}/rp_filter" for device in devices[:-2]
    }


def test_sysctls_are_not_taken_from_devices_that_were_read_before(served: Namespace) -> None:
    sight, *_ = looked()
    served.sysctl({KEY: 2})
    sight.forget(["sysctl"])
    assert sight.sysctls(frozenset())[KEY] == "2"
    sight = Sight()
    sight.links()
    served.sysctl({KEY: 1})
    sight.forget(["sysctl"])
    assert sight.sysctls(frozenset())[KEY] == "1"


def test_what_nobody_hears_of_is_read_again(served: Namespace) -> None:
    sight, _, _, rule = looked()
    sight.links()
    served.ip(["link add eth7 type veth peer name eth8"])
    served.run("ip", *rule.render().replace("-4", "-4 rule del", 1).replace("from all", "").split())
    served.sysctl({KEY: 2})
    sight.keep_heard()
    assert "eth7" in sight.links()
    assert rule not in sight.rules()[0]
    assert sight.sysctls(frozenset())[KEY] == "2"


def test_an_apply_of_the_daemon_knows_what_happened_up_to_now(served: Namespace, tmp_path: Path) -> None:
    """Also what the loop has not come to read yet."""
    file = tmp_path / "policy.yaml"
    file.write_bytes(POLICY)
    service = Service(StateDirectory(tmp_path), PolicyFiles(file), ServiceStats())
    with contextlib.ExitStack() as stack:
        service._selector = stack.enter_context(selectors.DefaultSelector())
        service._open_watches(stack)
        service._look()
        before = service._present_sight()
        known = before.routes()
        gone = next(route for route in known if route.gateway)
        served.run("ip", *gone.render().replace("-4", "-4 route del", 1).split())
        assert before.routes() is known
        assert known - service._present_sight().routes() == {gone}
        served.nft("delete table inet datapath")
        assert service._present_sight().table() is None
