# SPDX-License-Identifier: Apache-2.0
"""Rules and routes as raw netlink on the real kernel, against a model and against what pyroute2 makes of them."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyroute2 import IPRoute

from datapath.errors import KernelError
from datapath.kernel.fib_codec import AF, encode_rule
from datapath.kernel.netlink import BATCH_MAX, TRAFFIC, Netlink, Request
from datapath.kernel.rtnl import FibChange, Rtnl, Verb, ifindex
from datapath.plan.ingress import IpNetwork
from datapath.plan.rtnl import ROUTE_PROTOCOL, Family, FibRule, NextHop, Route, RouteType, RuleAction
from tests.netns.nodes import inside, node

pytestmark = pytest.mark.root

#: Every table of IPv6 is walked at each change of a rule, and none is ever freed.
TABLES = (1, 200, 255 + 1, 700_001, 0xFFFFFFFF)
DEVICES = ("", "eth1", "eth2")
ACTIONS = {1: RuleAction.LOOKUP, 2: RuleAction.GOTO, 3: RuleAction.NOP}
DELETE_RULE = 33
#: RT_SCOPE_*.
UNIVERSE, LINK = 0, 253
ONLINK = 4
U32 = st.integers(0, 0xFFFFFFFF)


@pytest.fixture(scope="module", autouse=True)
def _ground() -> Iterator[None]:
    with node(4) as made, inside(made.namespace.name):
        yield


def networks(family: Family) -> st.SearchStrategy[IpNetwork]:
    """Prefixes that the kernel takes for a unicast route, the default one among them."""
    if family is Family.IPV4:
        some = st.builds(
            lambda address, length: IPv4Network((address, length), strict=False),
            st.integers(0x0B000000, 0x7E000000),
            st.integers(8, 32),
        )
        return st.one_of(st.just(IPv4Network("0.0.0.0/0")), some)
    some6 = st.builds(
        lambda address, length: IPv6Network((address, length), strict=False),
        st.integers(0x2001 << 112, 0x3FFE << 112),
        st.integers(16, 128),
    )
    return st.one_of(st.just(IPv6Network("::/0")), some6)


@st.composite
def rules(draw: st.DrawFn) -> FibRule:
    family = draw(st.sampled_from(Family))
    priority = draw(st.integers(10, 32_000))
    action = draw(st.sampled_from(RuleAction))
    target = {
        RuleAction.LOOKUP: st.sampled_from(TABLES),
        RuleAction.GOTO: st.integers(priority + 1, 0xFFFFFFFF),
        RuleAction.NOP: st.just(0),
    }[action]
    selector = st.one_of(st.none(), networks(family).filter(lambda n: n.prefixlen > 0))
    mask = draw(st.one_of(st.just(0), st.integers(1, 0xFFFFFFFF)))
    return FibRule(
        family,
        priority,
        action,
        draw(target),
        draw(U32) & mask,
        mask,
        draw(selector),
        draw(selector),
        # A device may be missing, and a name as long as they can be.
        draw(st.sampled_from(["", "lo", "missing0", "a-name-15-bytes"])),
    )


@st.composite
def routes(draw: st.DrawFn) -> Route:
    family = draw(st.sampled_from(Family))
    is_refusal = draw(st.booleans())
    # IPv6 takes 0 for 1024.
    metric = draw(st.integers(1 if family is Family.IPV6 else 0, 0xFFFFFFFF))
    table, destination = draw(st.sampled_from(TABLES)), draw(networks(family))
    if is_refusal:
        return Route(table, destination, type=RouteType.UNREACHABLE, metric=metric)
    gateways: dict[Family, st.SearchStrategy[IPv4Address | IPv6Address]] = {
        Family.IPV4: st.integers(0x0B000001, 0x7E000000).map(IPv4Address),
        Family.IPV6: st.integers(0xFE80 << 112 | 1, (0xFE80 << 112) + 0xFFFFFFFF).map(IPv6Address),
    }
    device = draw(st.sampled_from(DEVICES[1:]))
    hops = draw(st.lists(st.builds(NextHop, gateways[family], st.integers(1, 256)), max_size=6))
    if family is Family.IPV6:
        # It refuses a gateway that comes twice; IPv4 takes it.
        hops = list({hop.gateway: hop for hop in hops}.values())
    if len(hops) > 1:
        return Route(table, destination, device, metric=metric, hops=tuple(hops))
    gateway = hops[0].gateway if hops else None
    return Route(table, destination, device, gateway, metric=metric)


def key(route: Route) -> tuple[object, ...]:
    """Two of the same cannot be in one table."""
    return route.table, route.destination, route.metric


def prefix(family: Family, address: str | None, length: int) -> IpNetwork:
    zero = IPv4Address(0) if family is Family.IPV4 else IPv6Address(0)
    return ip_network(f"{address or zero}/{length}")


def rule_by_pyroute2(message: Any, family: Family) -> FibRule:
    action = ACTIONS[message["action"]]
    target = {
        RuleAction.LOOKUP: message.get("FRA_TABLE"),
        RuleAction.GOTO: message.get("FRA_GOTO"),
        RuleAction.NOP: 0,
    }[action]
    source, destination = message["src_len"], message["dst_len"]
    return FibRule(
        family,
        message.get("FRA_PRIORITY") or 0,
        action,
        target,
        message.get("FRA_FWMARK") or 0,
        message.get("FRA_FWMASK") or 0,
        prefix(family, message.get("FRA_SRC"), source) if source else None,
        prefix(family, message.get("FRA_DST"), destination) if destination else None,
        message.get("FRA_IIFNAME") or "",
    )


def route_by_pyroute2(message: Any, family: Family, names: dict[int, str]) -> Route:
    is_refusal = message["type"] == 7
    gateway = message.get("RTA_GATEWAY")
    address = IPv4Address if family is Family.IPV4 else IPv6Address
    several = message.get("RTA_MULTIPATH") or ()
    hops = tuple(NextHop(address(hop.get("RTA_GATEWAY")), hop["hops"] + 1) for hop in several)
    assert all(hop["flags"] & ONLINK for hop in several)
    is_direct = family is Family.IPV4 and not is_refusal and not gateway and not hops
    assert message["scope"] == (LINK if is_direct else UNIVERSE)
    return Route(
        message.get("RTA_TABLE"),
        prefix(family, message.get("RTA_DST"), message["dst_len"]),
        "" if is_refusal else names[several[0]["oif"] if several else message.get("RTA_OIF")],
        address(gateway) if gateway else None,
        RouteType.UNREACHABLE if is_refusal else RouteType.UNICAST,
        message.get("RTA_PRIORITY") or 0,
        hops,
    )


def seen_by_pyroute2() -> tuple[list[FibRule], list[Route]]:
    """Ours, with duplicates if there are any."""
    names = {ifindex(name): name for name in DEVICES if name}
    found_rules, found_routes = [], []
    with IPRoute() as ipr:
        for family, number in AF.items():
            found_rules += [
                rule_by_pyroute2(message, family)
                for message in ipr.get_rules(family=number)
                if message.get("FRA_PROTOCOL") == ROUTE_PROTOCOL
            ]
            found_routes += [
                route_by_pyroute2(message, family, names)
                for message in ipr.get_routes(family=number)
                if message["proto"] == ROUTE_PROTOCOL
            ]
    return found_rules, found_routes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(rules(), unique=True, max_size=40), st.lists(routes(), unique_by=key, max_size=40))
def test_what_is_written_is_read_back(some_rules: list[FibRule], some_routes: list[Route]) -> None:
    items: list[FibRule | Route] = [*some_routes, *some_rules]
    with Rtnl() as rtnl:
        _, foreign = rtnl.rules()
        try:
            rtnl.change([FibChange(Verb.ADD, item) for item in items])
            assert rtnl.rules() == (frozenset(some_rules), foreign)
            assert rtnl.routes() == frozenset(some_routes)
            by_pyroute2 = seen_by_pyroute2()
            assert sorted(by_pyroute2[0], key=FibRule.sort_key) == sorted(some_rules, key=FibRule.sort_key)
            assert sorted(by_pyroute2[1], key=Route.sort_key) == sorted(some_routes, key=Route.sort_key)
        finally:
            rtnl.change([FibChange(Verb.DELETE, item) for item in items])
        assert rtnl.rules() == (frozenset(), foreign)
        assert rtnl.routes() == frozenset()


@pytest.mark.parametrize(
    ("destination", "gateways"),
    [
        (IPv4Network("0.0.0.0/0"), (IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2"))),
        (IPv6Network("::/0"), (IPv6Address("fe80::1"), IPv6Address("fe80::2"))),
    ],
)
def test_replacing_leaves_one_route(destination: IpNetwork, gateways: tuple[Any, Any]) -> None:
    old, new = (Route(700_001, destination, "eth1", gateway, metric=1024) for gateway in gateways)
    with Rtnl() as rtnl:
        rtnl.change([FibChange(Verb.ADD, old)])
        rtnl.change([FibChange(Verb.REPLACE, new)])
        assert rtnl.routes() == {new}
        rtnl.change([FibChange(Verb.DELETE, new)])


@pytest.mark.parametrize("family", Family)
def test_one_gateway_and_several_replace_each_other(family: Family) -> None:
    """Whatever there was before, and never two routes at once."""
    destination = IPv4Network("0.0.0.0/0") if family is Family.IPV4 else IPv6Network("::/0")
    address: Any = IPv4Address(0x0A000000) if family is Family.IPV4 else IPv6Address(0xFE80 << 112)
    route = Route(700_001, destination, "eth1", metric=1024)
    forms = [
        replace(route, gateway=address + 1),
        replace(route, hops=tuple(NextHop(address + n) for n in (1, 2, 3))),
        replace(route, hops=(NextHop(address + 3, 2), NextHop(address + 2))),
    ]
    if family is Family.IPV4:
        forms.append(
            replace(route, hops=(NextHop(address + 3), NextHop(address + 2, 7), NextHop(address + 3)))
        )
    with Rtnl() as rtnl:
        rtnl.change([FibChange(Verb.ADD, forms[0])])
        for old in forms:
            for new in forms:
                rtnl.change([FibChange(Verb.REPLACE, old)])
                rtnl.change([FibChange(Verb.REPLACE, new)])
                assert rtnl.routes() == {new}
        rtnl.change([FibChange(Verb.DELETE, forms[-1])])
        assert rtnl.routes() == frozenset()


def test_a_route_over_several_devices_is_not_one_of_ours_and_goes() -> None:
    """Somebody made it under our protocol: it must be seen as what it is, and deleted by its key."""
    lines = [
        "nexthop",
        "via",
        "10.0.0.1",
        "dev",
        "eth1",
        "onlink",
        "nexthop",
        "via",
        "10.0.0.1",
        "dev",
        "eth2",
        "onlink",
    ]
    argv = ["ip", "route", "add", "default", "table", "700001", "proto", str(ROUTE_PROTOCOL)]
    subprocess.run([*argv, *lines], check=True)
    hop = NextHop(IPv4Address("10.0.0.1"))
    with Rtnl() as rtnl:
        (found,) = rtnl.routes()
        assert found == Route(
            700_001, IPv4Network("0.0.0.0/0"), "eth1", hops=(hop, replace(hop, device="eth2"))
        )
        rtnl.change([FibChange(Verb.DELETE, found)])
        assert rtnl.routes() == frozenset()


def numbered(count: int) -> list[FibRule]:
    return [FibRule(Family.IPV4, 1000 + n, RuleAction.LOOKUP, 700_001) for n in range(count)]


def test_a_refusal_is_that_of_its_own_message_and_stops_nobody() -> None:
    present, *others = some = numbered(2 * BATCH_MAX + 2)
    with Rtnl() as rtnl:
        rtnl.change([FibChange(Verb.ADD, present)])
        changes = [FibChange(Verb.ADD, rule) for rule in [*others[:300], present, *others[300:]]]
        with pytest.raises(
            KernelError, match=f"add rule: File exists .*priority {present.priority} "
        ) as caught:
            rtnl.change(changes)
        assert caught.value.errno == errno.EEXIST
        assert "proto" in caught.value.hint
        assert rtnl.rules()[0] == frozenset(some)
        rtnl.change([FibChange(Verb.DELETE, rule) for rule in some])
        with pytest.raises(KernelError, match="delete rule: No such file") as caught:
            rtnl.change([FibChange(Verb.DELETE, present)])
        assert caught.value.errno == errno.ENOENT


def test_every_refusal_of_a_large_batch_arrives() -> None:
    rule = encode_rule(numbered(1)[0])
    with Netlink() as netlink:
        refusals = netlink.change([Request(DELETE_RULE, 0, rule)] * 3 * BATCH_MAX)
    assert [refusal.number for refusal in refusals] == list(range(3 * BATCH_MAX))
    assert {refusal.errno for refusal in refusals} == {errno.ENOENT}


def test_the_kernel_s_own_words_are_told() -> None:
    route = Route(700_001, IPv4Network("0.0.0.0/0"), "eth1", IPv4Address("224.0.0.1"))
    with Rtnl() as rtnl, pytest.raises(KernelError, match="Nexthop has invalid gateway"):
        rtnl.change([FibChange(Verb.ADD, route)])


def test_a_missing_device_is_named_and_nothing_is_sent() -> None:
    rule = numbered(1)[0]
    route = Route(700_001, IPv4Network("0.0.0.0/0"), "nowhere")
    with Rtnl() as rtnl:
        with pytest.raises(KernelError, match="find device nowhere: no such device") as refused:
            rtnl.change([FibChange(Verb.ADD, rule), FibChange(Verb.ADD, route)])
        assert refused.value.errno == errno.ENODEV
        assert rtnl.rules()[0] == frozenset()


def test_a_table_that_is_not_there_is_empty() -> None:
    with Rtnl() as rtnl:
        assert rtnl.foreign_routes([4_242_424]) == {}


def test_others_routes_are_found_by_their_table() -> None:
    with Rtnl() as rtnl, IPRoute() as ipr:
        ipr.route("add", dst="192.0.2.0/24", oif=ifindex("eth1"), table=300, proto=4)
        assert rtnl.foreign_routes([299, 300]) == {300: "192.0.2.0/24 by static"}
        ipr.route("del", dst="192.0.2.0/24", oif=ifindex("eth1"), table=300)


def test_a_thousand_changes_are_a_handful_of_system_calls() -> None:
    some = numbered(1000)
    with Rtnl() as rtnl:
        for verb in (Verb.ADD, Verb.DELETE):
            messages, calls = TRAFFIC.sent_messages, TRAFFIC.syscalls
            rtnl.change([FibChange(verb, rule) for rule in some])
            assert TRAFFIC.sent_messages - messages == len(some)
            # One to send and one to receive a batch; the first change of a socket makes room for refusals.
            assert TRAFFIC.syscalls - calls <= 2 * 4 + 1


def test_sockets_tell_whose_they_are() -> None:
    """Several at once, each by its own port id that holds the pid: an event then says who made the change."""
    with Netlink() as first, Netlink() as second, IPRoute():
        assert first.port != second.port
        assert {first.port & 0x3FFFFF, second.port & 0x3FFFFF} == {os.getpid()}
