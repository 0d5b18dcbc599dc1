# SPDX-License-Identifier: Apache-2.0
"""Networks in VRFs: their table, what leads out of it, and whose settings are touched."""

from __future__ import annotations

from typing import Any

import pytest

from datapath.compiler import compile_policy
from datapath.facts import Facts, IdFacts, LinkFacts
from datapath.plan.ingress import VipCheck
from datapath.plan.model import NoteLevel, Plan
from datapath.plan.rtnl import RouteType
from datapath.policy import Policy
from datapath.service.loop import interest_of

RED = {"name": "red", "table": 2, "create": True}
INTERNAL = {"internal": ["10.96.0.0/12", "fd00:96::/48"]}


def net(name: str, *, vrf: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    made = {"name": name, "interface": f"{name}0", "vips": ["192.0.2.0/24"], "gateway": "192.0.2.1"}
    return made | ({"vrf": vrf} if vrf else {}) | more


def compiled(*networks: dict[str, Any], facts: Facts | None = None, **top: Any) -> Plan:
    value = {"version": 1, "node": INTERNAL, "networks": list(networks)} | top
    return compile_policy(Policy.model_validate(value), facts or Facts())


def leaks(plan: Plan) -> list[str]:
    return [rule.render() for rule in plan.rules if rule.device]


def routes(plan: Plan) -> list[str]:
    return [route.render() for route in plan.routes]


def test_ipv4_leaks_by_the_device_and_ipv6_by_the_vrf() -> None:
    assert leaks(compiled(net("a", vrf=RED))) == [
        "-4 priority 900 from all to 10.96.0.0/12 iif a0 lookup 254 protocol 78",
        "-6 priority 900 from all to fd00:96::/48 iif red lookup 254 protocol 78",
    ]


def test_more_can_be_leaked_and_elsewhere() -> None:
    plan = compiled(net("a", vrf=RED | {"leak": ["192.168.1.0/24"]}), net("b"), rules={"leak_priority": 77})
    assert "-4 priority 77 from all to 192.168.1.0/24 iif a0 lookup 254 protocol 78" in leaks(plan)
    assert not any("iif b0" in rule for rule in leaks(plan))


def test_the_table_is_the_vrfs_and_ends_in_both_families() -> None:
    plan = compiled(net("a", vrf=RED))
    assert routes(plan) == [
        "-4 0.0.0.0/0 via 192.0.2.1 dev a0 onlink table 2 protocol 78 metric 10",
        "-4 unreachable 0.0.0.0/0 table 2 protocol 78 metric 4294967295",
        "-4 192.0.2.0/24 dev a0 table 2 protocol 78 metric 10",
        "-6 unreachable ::/0 table 2 protocol 78 metric 4294967295",
    ]
    (ids,) = plan.ids
    assert ids.table == 2
    assert [rule.target for rule in plan.rules if rule.fwmask] == [2]


def test_the_daemon_hears_of_the_vrf_and_not_of_what_others_route_there() -> None:
    interest = interest_of(
        compiled(net("a", vrf=RED), net("b", vips=["198.51.100.0/24"], gateway="198.51.100.1"))
    )
    assert interest.tables == {700_002}
    assert interest.devices >= {"red", "a0", "b0"}


def test_external_routes_of_a_vrf_are_those_of_the_daemon() -> None:
    plan = compiled(net("a", vrf=RED, gateway=[], routes="external", on_link=["192.0.2.0/29"]))
    assert [route for route in routes(plan) if "unreachable" not in route] == [
        "-4 192.0.2.0/29 dev a0 table 2 protocol 78 metric 10"
    ]
    (network,) = plan.ingress.networks
    assert network.vip_check is VipCheck.OFF


def test_a_kernel_without_ipv6_gets_none_of_it() -> None:
    plan = compiled(net("a", vrf=RED), facts=Facts(ipv6=False))
    assert {route.family for route in plan.routes} == {4}


def test_without_a_gateway_replies_follow_what_others_put_into_the_vrf() -> None:
    (network,) = (plan := compiled(net("a", vrf=RED, gateway=[]))).ingress.networks
    assert network.fwmark
    assert network.vip_check is VipCheck.STRICT
    assert "-4 192.0.2.0/24 dev a0 table 2 protocol 78 metric 10" in routes(plan)
    assert not any("via" in route for route in routes(plan))


@pytest.mark.parametrize("return_path", ["source", "none"])
def test_other_return_paths(return_path: str) -> None:
    plan = compiled(net("a", vrf=RED, return_path=return_path))
    assert not any(rule.fwmask for rule in plan.rules)
    assert bool([r for r in plan.routes if r.type is RouteType.UNICAST]) == (return_path == "source")
    # Whatever becomes of replies, the VRF is a VRF.
    assert [r.table for r in plan.routes if r.type is RouteType.UNREACHABLE] == [2, 2]
    assert plan.slaves
    assert leaks(plan)


def test_networks_share_a_vrf() -> None:
    other = net("b", vrf=RED, vips=["198.51.100.0/24"], gateway=[])
    plan = compiled(net("a", vrf=RED), other)
    assert {ids.table for ids in plan.ids} == {2}
    assert len({ids.fwmark for ids in plan.ids}) == 2
    assert [vrf.render() for vrf in plan.vrfs] == ["link name red type vrf table 2"]
    assert [slave.render() for slave in plan.slaves] == ["link a0 master red", "link b0 master red"]
    assert len([route for route in plan.routes if route.type is RouteType.UNREACHABLE]) == 2


def test_nobody_else_gets_the_table_of_a_vrf() -> None:
    first = compiled(net("a")).ids[0].table
    plan = compiled(net("a"), net("b", vrf=RED | {"table": first}, vips=["198.51.100.0/24"], gateway=[]))
    assert {ids.name: ids.table for ids in plan.ids} == {"a": first + 1, "b": first}


def test_a_network_leaves_the_table_in_the_vrf() -> None:
    facts = Facts(
        links=(LinkFacts(name="red", kind="vrf", vrf_table=2),),
        ids=(IdFacts(name="a", fwmark=0x10000, table=2, slot=1),),
        fwmark_mask=0x0FFF0000,
    )
    (ids,) = compiled(net("a"), facts=facts).ids
    assert (ids.fwmark, ids.table) == (0x10000, 700_001)


def test_settings_of_the_vrf_itself_are_left_alone() -> None:
    plan = compiled(net("a", vrf=RED))
    keys = {setting.key for setting in plan.sysctls}
    assert "net/ipv6/conf/a0/keep_addr_on_down" in keys
    assert not any("/red/" in key for key in keys)
    assert plan.rp_filter_exempt == ("a0",)


def test_host_sockets_are_a_choice() -> None:
    accept = {"net/ipv4/tcp_l3mdev_accept", "net/ipv4/udp_l3mdev_accept"}
    with_them, without = (
        compiled(
            net("a", vrf=RED | {"host_sockets": on}), facts=Facts(links=(LinkFacts(name="z", kind="vrf"),))
        )
        for on in (True, False)
    )
    assert accept <= {setting.key for setting in with_them.sysctls}
    assert not accept & {setting.key for setting in without.sysctls}
    assert any("also from z" in note.text for note in with_them.notes)
    assert not any("also from z" in note.text for note in without.notes)


def test_a_vrf_that_leads_nowhere_is_told() -> None:
    plan = compiled(net("a", vrf=RED), facts=Facts(links=(LinkFacts(name="a0", vrf="red"),)), node={})
    assert [note.element for note in plan.notes if note.level is NoteLevel.WARNING] == ["node.internal"]
    assert leaks(plan) == []
