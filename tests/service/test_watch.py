# SPDX-License-Identifier: Apache-2.0
"""What wakes the daemon, and what does not."""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path

import pytest

from datapath.kernel.rtnl import FibChange, Rtnl, Verb
from datapath.kernel.watch import Event, Interest, NftWatch, RouteWatch
from datapath.plan.rtnl import Route
from tests.service.daemon import DEVICES, Node, wait_until

pytestmark = pytest.mark.root

_FOREIGN_ROUTES = 10_000


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Devices, no daemon."""
    made = Node(tmp_path_factory.mktemp("watch"))

    def is_settled() -> bool:
        shown = made.ns.run("ip", "-6", "-o", "addr", "show", "scope", "link")
        return shown.count("fe80::") >= len(DEVICES) and "tentative" not in shown

    wait_until(is_settled, "the devices have their addresses: these events are not what is asked for here")
    yield made
    made.close()


@pytest.fixture
def routes(node: Node) -> Iterator[RouteWatch]:
    """A watch that takes an interest in eth0 and two tables."""

    def make() -> RouteWatch:
        watch = RouteWatch()
        watch.follow(Interest(frozenset({"eth0", "eth9"}), frozenset({700_001, 77})))
        return watch

    watch = node.ns.call(make)
    yield watch
    watch.close()


def _kinds(events: list[Event]) -> set[str]:
    return {event.kind for event in events}


def test_foreign_routes_wake_nobody(node: Node, routes: RouteWatch) -> None:
    """As from a BGP daemon: in main, in a small table and in a large one that is not ours."""
    lines = []
    for number in range(_FOREIGN_ROUTES // 2):
        table = (254, 99, 1_000_099)[number % 3]
        where = f"198.18.{number % 256}.{number // 256}/32 dev eth1 table {table} proto bird"
        lines += [f"route add {where}", f"route del {where}"]
    began, used = time.monotonic(), time.process_time()
    node.ns.ip(lines)
    seconds = time.monotonic() - began
    readable, _, _ = select.select([routes], [], [], 0)
    assert not readable, "the kernel dropped all of them before they reached the socket"
    assert routes.read() == []
    sys.stdout.write(
        f"{_FOREIGN_ROUTES / seconds:.0f} route changes a second: no wake-up, "
        f"{time.process_time() - used:.3f} s of CPU in this process\n"
    )


@pytest.mark.parametrize(
    "where",
    [
        "198.51.100.0/24 dev eth0 table 700001 proto bird",
        "198.51.100.0/24 dev eth0 table 77 proto bird",
        "198.51.100.0/24 dev eth0 proto 78",
    ],
)
def test_routes_that_concern_us_come_through(node: Node, routes: RouteWatch, where: str) -> None:
    node.ns.ip([f"route add {where}", f"route del {where}"])
    events = routes.read()
    assert [event.what for event in events] == ["route added or changed", "route deleted"]
    assert all(event.by.startswith("ip[") or "gone" in event.by for event in events)


@pytest.mark.parametrize(
    ("line", "undo", "kind"),
    [
        ("addr add 198.51.100.1/32 dev eth1", "addr del 198.51.100.1/32 dev eth1", "address"),
        ("link set eth0 mtu 1400", "link set eth0 mtu 1500", "link"),
        ("link add eth9 type veth peer name p-eth9", "link del eth9", "link"),
        ("rule add priority 9 lookup 9 protocol 78", "rule del priority 9", "rule"),
        ("-6 rule add priority 9 lookup 9 protocol 78", "-6 rule del priority 9", "rule"),
    ],
)
def test_what_concerns_us(node: Node, routes: RouteWatch, line: str, undo: str, kind: str) -> None:
    node.ns.ip([line])
    assert kind in _kinds(routes.read())
    node.ns.ip([undo])
    assert kind in _kinds(routes.read())


@pytest.mark.parametrize(
    ("line", "undo"),
    [
        ("link set eth1 mtu 1400", "link set eth1 mtu 1500"),
        ("rule add priority 9 lookup 9 protocol bird", "rule del priority 9"),
        ("addr add fe80::9/64 dev eth1", "addr del fe80::9/64 dev eth1"),
    ],
)
def test_what_does_not_concern_us(node: Node, routes: RouteWatch, line: str, undo: str) -> None:
    node.ns.ip([line, undo])
    assert routes.read() == []


def test_tc_and_rp_filter_of_our_devices(node: Node, routes: RouteWatch) -> None:
    node.ns.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    assert _kinds(routes.read()) == {"tc"}
    node.ns.run("tc", "qdisc", "add", "dev", "eth1", "clsact")
    assert routes.read() == []
    node.ns.sysctl({"net/ipv4/conf/eth0/rp_filter": 2})
    assert _kinds(routes.read()) == {"sysctl"}
    node.ns.sysctl({"net/ipv4/conf/eth1/rp_filter": 2})
    assert routes.read() == []


def test_own_changes_are_no_events(node: Node, routes: RouteWatch) -> None:
    route = Route(700_001, ip_network("198.51.100.0/24"), "eth0")

    def change() -> None:
        with Rtnl() as rtnl:
            rtnl.change([FibChange(Verb.ADD, route)])
            rtnl.change([FibChange(Verb.DELETE, route)])

    node.ns.call(change)
    assert routes.read() == []


def test_a_transaction_is_one_event_and_foreign_tables_none(node: Node) -> None:
    watch = node.ns.call(NftWatch)
    try:
        elements = ", ".join(f"10.0.{number // 256}.{number % 256}" for number in range(3000))
        foreign = f"set s {{\n type ipv4_addr\n elements = {{ {elements} }}\n }}\n"
        node.ns.nft(f"table inet kube-proxy {{\n {foreign} }}\n")
        assert watch.read() == []
        node.ns.nft("table inet datapath {\n chain a {\n counter\n }\n chain b {\n counter\n }\n }\n")
        (event,) = watch.read()
        assert event.by.startswith("nft[")
        node.ns.nft("flush ruleset")
        (event,) = watch.read()
        assert event.what == "table deleted"
    finally:
        watch.close()


def test_raw_dumps_say_what_iproute2_says(node: Node) -> None:
    node.ns.ip(["route add 203.0.113.0/24 via 192.0.2.1 dev eth0 onlink table 700001 proto 78 metric 5"])
    node.ns.ip(["-6 rule add priority 99 fwmark 0x10000/0xff0000 lookup 700001 protocol 78"])

    def read() -> tuple[list[str], list[str], set[str]]:
        with Rtnl() as rtnl:
            own, _ = rtnl.rules()
            return [r.render() for r in rtnl.routes()], [r.render() for r in own], set(rtnl.links())

    routes, rules, links = node.ns.call(read)
    assert routes == ["-4 203.0.113.0/24 via 192.0.2.1 dev eth0 onlink table 700001 protocol 78 metric 5"]
    assert rules == ["-6 priority 99 from all fwmark 0x00010000/0x00ff0000 lookup 700001 protocol 78"]
    shown = node.ns.run("ip", "-o", "link").splitlines()
    assert links == {line.split(": ")[1].partition("@")[0] for line in shown}


def test_events_that_do_not_fit_are_told_as_lost(node: Node, routes: RouteWatch, tmp_path: Path) -> None:
    batch = tmp_path / "batch"
    batch.write_text("addr add 198.51.100.3/32 dev eth1\naddr del 198.51.100.3/32 dev eth1\n" * 6000)
    node.ns.run("ip", "-batch", str(batch))
    found: set[str] = set()
    for _ in range(200):
        events = routes.read()
        found |= _kinds(events)
        if not events:
            break
    assert "lost" in found
