# SPDX-License-Identifier: Apache-2.0
"""`routes: external`: what is ours in a table that others fill, and what is not looked at there."""

from __future__ import annotations

from ipaddress import ip_interface
from typing import Any

import pytest

from datapath.compiler import compile_policy
from datapath.facts import Facts, LinkFacts
from datapath.plan.ingress import VipCheck
from datapath.plan.model import Plan
from datapath.plan.rtnl import RouteType
from datapath.policy import Policy, check_policy
from datapath.reconcile.actual import Actual, ActualLink, ForeignRule
from datapath.reconcile.conflicts import find_conflicts, new_tables
from datapath.service.loop import interest_of

HOST = Facts(links=(LinkFacts(name="eth1", addresses=(ip_interface("192.0.2.10/24"),)),))
VIPS = ["198.51.100.0/24", "2001:db8:9::/64"]


def policy(**network: Any) -> Policy:
    body = {"name": "net", "interface": "eth1", "vips": VIPS, "table": 1000, "routes": "external"} | network
    return Policy.model_validate({"version": 1, "networks": [body]})


def compiled(**network: Any) -> Plan:
    assert check_policy(policy(**network)) == []
    return compile_policy(policy(**network), HOST)


@pytest.mark.parametrize("return_path", ["conntrack", "source"])
def test_only_neighbours_and_a_last_route_are_ours(return_path: str) -> None:
    plan = compiled(return_path=return_path, on_link=["192.0.2.0/24"])
    assert {route.table for route in plan.routes} == {1000}
    assert [route.gateway for route in plan.routes] == [None] * 4
    last = [route for route in plan.routes if route.type is RouteType.UNREACHABLE]
    assert [(route.destination.prefixlen, route.metric) for route in last] == [(0, 0xFFFFFFFF)] * 2
    assert {str(r.destination) for r in plan.routes} - {"0.0.0.0/0", "::/0"} == {"192.0.2.0/24", "fe80::/64"}
    assert {rule.target for rule in plan.rules if rule.fwmask or rule.source} == {1000}


def test_both_families_are_steered_even_where_the_vips_are_in_the_own_subnet() -> None:
    plan = compiled(vips=["192.0.2.7", "2001:db8:9::7"])
    assert sorted({int(rule.family) for rule in plan.rules}) == [4, 6]
    assert plan.external_tables == (1000,)


def test_vip_prefixes_are_on_no_link_and_so_no_source() -> None:
    (network,) = compiled().ingress.networks
    assert network.sources == ()
    (own,) = compiled(routes="own", return_path="conntrack", reverse_path={"vips": "off"}).ingress.networks
    assert [str(source.prefix) for source in own.sources] == VIPS


@pytest.mark.parametrize(
    ("reverse_path", "check"),
    [({}, VipCheck.OFF), ({"vips": "strict"}, VipCheck.STRICT), ({"other": "loose"}, VipCheck.OFF)],
)
def test_feasible_is_not_told_from_the_plan(reverse_path: dict[str, str], check: VipCheck) -> None:
    (network,) = compiled(reverse_path=reverse_path).ingress.networks
    assert network.vip_check is check
    assert network.feasible == ()


def test_routes_and_rules_of_others_are_welcome_in_that_table_alone() -> None:
    rule = ForeignRule(4, 32000, 0, 0, 1000, 11, "ip -4 rule 32000: lookup 1000")  # type: ignore[arg-type]
    actual = Actual(
        foreign_tables={1000: "0.0.0.0/0 by BGP"},
        foreign_rules=(rule,),
        links={"eth1": ActualLink("eth1", up=True)},
    )
    assert find_conflicts(actual, compiled()) == ()
    own = compiled(routes="own", gateway="192.0.2.1", on_link=["192.0.2.0/24"])
    assert new_tables(actual, own) == {1000}
    (conflict,) = find_conflicts(actual, own)
    assert "0.0.0.0/0 by BGP" in conflict
    # It is not even read: a routing daemon may have a million routes there.
    assert new_tables(actual, compiled()) == frozenset()


def test_a_daemon_does_not_listen_to_what_others_do_there() -> None:
    assert interest_of(compiled()).tables == frozenset()
    own = compiled(routes="own", gateway="192.0.2.1", on_link=["192.0.2.0/24"])
    assert 1000 in interest_of(own).tables


def test_the_mask_must_have_room_for_them() -> None:
    networks = [
        {
            "name": f"n{i}",
            "interface": f"e{i}",
            "vips": [f"10.0.{i}.1"],
            "table": 1000 + i,
            "routes": "external",
        }
        for i in range(4)
    ]
    full = Policy.model_validate({"version": 1, "networks": networks, "marks": {"mask": 0x300}})
    assert [problem.path for problem in check_policy(full)] == [("marks",)]


def test_in_a_vrf_the_table_is_that_of_the_vrf() -> None:
    red = {"name": "red", "table": 2, "create": True}
    networks = [
        {
            "name": f"n{i}",
            "interface": f"eth{i}",
            "vips": [f"198.51.{i}.0/24"],
            "vrf": red,
            "routes": "external",
        }
        for i in range(2)
    ]
    shared = Policy.model_validate({"version": 1, "networks": networks})
    assert check_policy(shared) == []
    plan = compile_policy(shared, Facts())
    assert plan.external_tables == (2,)
    assert {route.type for route in plan.routes if route.table == 2} == {RouteType.UNREACHABLE}
