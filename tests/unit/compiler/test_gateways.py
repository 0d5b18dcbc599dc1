# SPDX-License-Identifier: Apache-2.0
"""Several gateways: who gets which flows, compared with the kernel's own arithmetic, and what is watched."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datapath.compiler import compile_policy
from datapath.compiler.gateways import next_hops, rerouted
from datapath.facts import Facts
from datapath.plan.gateways import CheckMethod
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family, NextHop
from datapath.policy import Network, Policy
from datapath.policy.gateways import GATEWAYS_MAX, WEIGHT_MAX

Address = IPv4Address | IPv6Address
FAMILIES = st.sampled_from(Family)
WEIGHTS = st.lists(st.integers(1, WEIGHT_MAX), min_size=1, max_size=GATEWAYS_MAX)


def address(family: Family, number: int) -> Address:
    return ip_address(f"10.1.0.{number + 1}" if family is Family.IPV4 else f"2001:db8::{number + 1}")


def network(family: Family, weights: list[int], **extra: Any) -> Network:
    prefix = "10.1.0.0/24" if family is Family.IPV4 else "2001:db8::/64"
    gateways = [{"address": str(address(family, n)), "weight": weight} for n, weight in enumerate(weights)]
    body = {"name": "n", "interface": "eth1", "vips": [prefix], "gateways": gateways}
    return Network.model_validate(body | extra)


def parts(hops: tuple[NextHop, ...]) -> list[tuple[Fraction, Fraction, Address]]:
    """Begin, end and owner of each part of the hash values: `fib_rebalance` and `rt6_upper_bound_set` of the kernel."""
    total = sum(hop.weight for hop in hops)
    found, passed = [], 0
    for hop in hops:
        found.append((Fraction(passed, total), Fraction(passed + hop.weight, total), hop.gateway))
        passed += hop.weight
    return found


def moved(before: tuple[NextHop, ...], after: tuple[NextHop, ...]) -> dict[tuple[Address, Address], Fraction]:
    """The share of all flows that goes from one gateway to another one."""
    result: dict[tuple[Address, Address], Fraction] = {}
    for begin, end, old in parts(before):
        for start, stop, new in parts(after):
            share = min(end, stop) - max(begin, start)
            if share > 0 and old != new:
                result[old, new] = result.get((old, new), Fraction(0)) + share
    return result


def share(hops: tuple[NextHop, ...], gateway: Address) -> Fraction:
    return sum((end - begin for begin, end, owner in parts(hops) if owner == gateway), Fraction(0))


@st.composite
def some_down(draw: st.DrawFn) -> tuple[Family, list[int], set[int]]:
    """Gateways by weight, and those of them that are down; one at least is not."""
    weights = draw(WEIGHTS)
    down = draw(st.sets(st.integers(0, len(weights) - 1), max_size=len(weights) - 1))
    return draw(FAMILIES), weights, down


@settings(deadline=None)
@given(some_down())
def test_only_flows_of_a_dead_gateway_move(case: tuple[Family, list[int], set[int]]) -> None:
    family, weights, numbers = case
    subject = network(family, weights)
    down = [address(family, number) for number in numbers]
    before, after = next_hops(subject, family, ()), next_hops(subject, family, down)
    assert not {hop.gateway for hop in after} & set(down)
    assert {hop.gateway for hop in after} | set(down) == {hop.gateway for hop in before}
    assert all(1 <= hop.weight <= 256 for hop in after)
    if family is Family.IPV6:
        assert len({hop.gateway for hop in after}) == len(after), (
            "the kernel refuses a gateway that comes twice"
        )
    for (old, _), flows in moved(before, after).items():
        # Weights beyond 256 are rounded: parts of such a route do not come out even.
        assert old in down or (flows < Fraction(1, 20) and max(hop.weight for hop in after) == 256)


@settings(deadline=None)
@given(st.lists(st.integers(1, 3), min_size=2, max_size=4), FAMILIES)
def test_with_usual_weights_not_a_single_other_flow_moves(weights: list[int], family: Family) -> None:
    subject = network(family, weights)
    before = next_hops(subject, family, ())
    for number in range(len(weights)):
        gone = address(family, number)
        after = next_hops(subject, family, [gone])
        assert {old for old, _ in moved(before, after)} == {gone}
        assert {old for _, old in moved(after, before)} == {gone}, "and they go back"


@settings(deadline=None)
@given(some_down())
def test_ipv4_gateways_take_over_by_their_weights(case: tuple[Family, list[int], set[int]]) -> None:
    _, weights, numbers = case
    subject = network(Family.IPV4, weights)
    hops = next_hops(subject, Family.IPV4, [address(Family.IPV4, number) for number in numbers])
    alive = sum(weight for number, weight in enumerate(weights) if number not in numbers)
    for number in set(range(len(weights))) - numbers:
        expected = Fraction(weights[number], alive)
        assert abs(share(hops, address(Family.IPV4, number)) - expected) < Fraction(1, 20)


def test_shares_are_exact_where_they_fit() -> None:
    subject = network(Family.IPV4, [1, 1, 1])
    hops = next_hops(subject, Family.IPV4, [address(Family.IPV4, 0)])
    assert [(str(hop.gateway), hop.weight) for hop in hops] == [
        ("10.1.0.2", 1),
        ("10.1.0.3", 1),
        ("10.1.0.2", 2),
        ("10.1.0.3", 2),
    ]
    subject = network(Family.IPV6, [1, 1, 1])
    hops = next_hops(subject, Family.IPV6, [address(Family.IPV6, 0)])
    assert [(str(hop.gateway), hop.weight) for hop in hops] == [("2001:db8::2", 2), ("2001:db8::3", 1)]


@settings(deadline=None)
@given(WEIGHTS, FAMILIES, st.sampled_from(["ecmp", "active_standby"]))
def test_all_down_is_as_none_down(weights: list[int], family: Family, mode: str) -> None:
    """A check must never be what cuts a node off."""
    subject = network(family, weights, gateway_mode=mode)
    everything = [address(family, number) for number in range(len(weights))]
    assert next_hops(subject, family, everything) == next_hops(subject, family, ())


@settings(deadline=None)
@given(some_down())
def test_standby_uses_the_first_that_is_up(case: tuple[Family, list[int], set[int]]) -> None:
    family, weights, numbers = case
    subject = network(family, weights, gateway_mode="active_standby")
    hops = next_hops(subject, family, [address(family, number) for number in numbers])
    first = min(set(range(len(weights))) - numbers)
    assert hops == (NextHop(address(family, first)),)


def policy(mode: str, **extra: Any) -> Policy:
    one = {
        "name": "one",
        "interface": "eth1",
        "vips": ["10.1.0.0/24", "2001:db8::/64"],
        "gateways": ["10.1.0.1", "10.1.0.2", "10.1.0.3", "2001:db8::1", "2001:db8::2", "2001:db8::3"],
        "gateway_mode": mode,
    }
    two = {"name": "two", "interface": "eth2", "vips": ["10.2.0.0/24"], "gateway": "10.2.0.1"}
    three = {
        "name": "three",
        "interface": "eth3",
        "vips": ["10.3.0.0/24"],
        "gateways": ["10.3.0.1", "10.3.0.2"],
    }
    three["gateway_mode"] = mode
    return Policy.model_validate({"version": 1, "networks": [one | extra, two, three | extra]})


def compiled(subject: Policy, down: dict[str, tuple[Address, ...]]) -> Plan:
    return compile_policy(subject, Facts(gateways_down=down, default_devices={4: ("eth0",), 6: ("eth0",)}))


@st.composite
def down_of(draw: st.DrawFn) -> dict[str, tuple[Address, ...]]:
    one = draw(st.sets(st.sampled_from(["10.1.0.1", "10.1.0.2", "10.1.0.3", "2001:db8::1", "2001:db8::2"])))
    three = draw(st.sets(st.sampled_from(["10.3.0.1", "10.3.0.2"])))
    found = {"one": tuple(map(ip_address, sorted(one))), "three": tuple(map(ip_address, sorted(three)))}
    return {name: addresses for name, addresses in found.items() if addresses}


@settings(deadline=None)
@given(down_of(), down_of(), st.sampled_from(["ecmp", "active_standby", "direct"]))
def test_rerouting_gives_what_compiling_gives(
    before: dict[str, tuple[Address, ...]], after: dict[str, tuple[Address, ...]], kind: str
) -> None:
    extra = {"steering": "direct"} if kind == "direct" else {}
    subject = policy("active_standby" if kind == "direct" else kind, **extra)
    assert rerouted(compiled(subject, before), subject, after) == compiled(subject, after)


def test_nothing_else_depends_on_health() -> None:
    subject = policy("ecmp")
    down: dict[str, tuple[Address, ...]] = {"one": (ip_address("10.1.0.1"),)}
    with_down, without = compiled(subject, down), compiled(subject, {})
    assert with_down.routes != without.routes
    assert dataclasses.replace(with_down, routes=()) == dataclasses.replace(without, routes=())


def test_what_is_watched() -> None:
    checks = compiled(policy("ecmp", gateway_check={"interval_ms": 50, "hold_s": 2}), {}).checks
    assert [check.network for check in checks] == ["one"] * 6 + ["three"] * 2, "`gateway` is not watched"
    assert {(check.interval_s, check.hold_s, check.method) for check in checks} == {
        (0.05, 2, CheckMethod.NEIGHBOUR)
    }
    assert not compiled(policy("ecmp", gateway_check={"method": "off"}), {}).checks
    assert not compiled(policy("ecmp", return_path="none"), {}).checks, "no answer goes there"


@pytest.mark.parametrize("extra", [{}, {"return_path": "source"}])
def test_feasibility_does_not_ask_who_is_up(extra: dict[str, Any]) -> None:
    everything = tuple(map(ip_address, ("10.1.0.1", "10.1.0.2", "10.1.0.3")))
    plan = compiled(policy("ecmp", **extra), {"one": everything})
    one = next(item for item in plan.ingress.networks if item.name == "one")
    assert "0.0.0.0/0" in map(str, one.feasible)
