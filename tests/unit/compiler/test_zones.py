# SPDX-License-Identifier: Apache-2.0
"""Zones of isolated networks: who gets which, who is in the way, and the tables while connections move."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.compiler import compile_policy
from datapath.compiler.zone_ids import ZONE_BASE, ZONE_LAST
from datapath.controller import id_facts
from datapath.errors import CompileError
from datapath.facts import Facts, IdFacts
from datapath.kernel.ids import parse_ids
from datapath.kernel.zones_in_use import has_stale_early_demux
from datapath.plan.model import Plan
from datapath.plan.nft import NftTable
from datapath.policy import Policy, check_policy
from datapath.policy.model import NETWORKS_MAX
from datapath.reconcile.actual import Actual, ActualLink, Record
from datapath.reconcile.diff import reconcile
from datapath.reconcile.nft import as_actual
from datapath.reconcile.steps import MoveConnections, NftTransaction


def of(*names: str, plain: tuple[str, ...] = (), **pins: int) -> Policy:
    """Isolated networks, and `plain` ones."""
    networks: list[dict[str, Any]] = [
        {
            "name": name,
            "interface": f"eth{name}",
            "vips": ["192.0.2.0/24"] if name in names else [f"198.51.{number}.0/24"],
            "gateway": "192.0.2.1" if name in names else f"198.51.{number}.1",
            "isolate_clients": name in names,
        }
        | ({"zone": pins[name]} if name in pins else {})
        for number, name in enumerate((*names, *plain))
    ]
    policy = Policy.model_validate({"version": 1, "networks": networks})
    assert check_policy(policy) == []
    return policy


def compiled(policy: Policy, before: Plan | None = None, **facts: Any) -> Plan:
    ids = id_facts(before.ids) if before else ()
    return compile_policy(policy, Facts(ids=ids, fwmark_mask=0x0FFF0000 if before else 0, **facts))


def zones(plan: Plan) -> dict[str, int]:
    return {ids.name: ids.zone for ids in plan.ids}


def elements(table: NftTable | None) -> dict[str, str]:
    assert table is not None
    return next((dict(item.elements) for item in table.maps if item.name == "zones"), {})


def test_zones_follow_the_names_and_are_set_by_the_device() -> None:
    plan = compiled(of("b", "a", plain=("c",)))
    assert zones(plan) == {"a": 40001, "b": 40002, "c": 0}
    assert elements(plan.table) == {'"etha"': "40001", '"ethb"': "40002"}
    assert (plan.zone_changes, plan.transition, plan.holding) == ((), None, None)


@given(st.lists(st.sets(st.sampled_from("abcdefgh"), min_size=1), min_size=1, max_size=6))
def test_no_zone_ever_moves_or_is_given_twice(steps: list[set[str]]) -> None:
    before: Plan | None = None
    for names in steps:
        plan = compiled(of(*names), before)
        given_out = zones(plan)
        assert len(set(given_out.values())) == len(names)
        assert 0 not in given_out.values()
        if before:
            kept = zones(before)
            assert all(given_out[name] == kept[name] for name in names if name in kept)
            # What a network has left may still be in a connection's tuple until they are forgotten.
            fresh = {given_out[name] for name in names if name not in kept}
            assert not fresh & set(kept.values())
        before = plan


def test_pins_win_and_ids_come_back_from_the_kernels_comments() -> None:
    first = compiled(of("a", "b"))
    pinned = compiled(of("a", "b", a=40002), first)
    assert zones(pinned) == {"a": 40002, "b": 40001}
    assert pinned.table is not None
    comments = [value for item in pinned.table.maps if item.name == "ids" for _, value in item.elements]
    assert {ids.name: ids.zone for ids in parse_ids(comments).ids} == zones(pinned)


def test_zones_of_others_are_avoided_and_kept_out_of_pins() -> None:
    taken = {40001: "nft table inet vrf_zones, chain in", 7: "iptables-legacy table raw, chain PREROUTING"}
    assert zones(compiled(of("a"), taken_zones=taken)) == {"a": 40002}
    with pytest.raises(CompileError) as caught:
        compiled(of("a", a=7), taken_zones=taken)
    (problem,) = caught.value.problems
    assert problem.path == ("networks", 0, "zone")
    assert "zone 7 is used by iptables-legacy table raw, chain PREROUTING" in problem.message
    # What is in use by us is not taken away by somebody who came later.
    had = compiled(of("a", a=7))
    assert zones(compiled(of("a", a=7), had, taken_zones=taken)) == {"a": 7}


def test_when_none_is_left_the_network_and_the_owner_are_named() -> None:
    others = dict.fromkeys(range(ZONE_BASE + 2, ZONE_LAST + 1), "nft table inet hog, chain c")
    assert zones(compiled(of("a"), taken_zones=others)) == {"a": 40001}
    with pytest.raises(CompileError) as caught:
        compiled(of("a", "b"), taken_zones=others)
    (problem,) = caught.value.problems
    assert problem.path == ("networks", 1, "isolate_clients")
    assert "no connection-tracking zone is left for network b" in problem.message
    assert "nft table inet hog, chain c" in problem.message
    assert zones(compiled(of("a", "b", b=9), taken_zones=others)) == {"a": 40001, "b": 9}


def test_there_are_zones_for_all_networks_of_a_policy() -> None:
    assert ZONE_LAST - ZONE_BASE >= 2 * NETWORKS_MAX


def test_connections_move_while_their_requests_wait() -> None:
    """Until they are moved, the old zone is set and written down; nothing else of the table differs."""
    before = compiled(of(plain=("a", "b")))
    plan = compiled(of("a", plain=("b",)), before)
    (change,) = plan.zone_changes
    assert (change.name, change.device, change.old, change.new) == ("a", "etha", 0, 40001)
    assert elements(plan.transition) == {}
    assert elements(plan.holding) == {}
    assert elements(plan.table) == {'"etha"': "40001"}
    assert plan.holding is not None
    (chain,) = [chain for chain in plan.holding.chains if chain.name == "zones"]
    assert chain.rules[0].text == "iifname @held drop"
    # Whoever is killed now leaves a node that serves again by itself.
    assert [item.elements for item in plan.holding.maps if item.name == "held"] == [
        (('"etha" timeout 20s', ""),)
    ]
    assert plan.table is not None
    assert not any(item.name == "held" for item in plan.table.maps)
    for table in (plan.transition, plan.holding):
        assert table is not None
        comments = [value for item in table.maps if item.name == "ids" for _, value in item.elements]
        assert {ids.zone for ids in parse_ids(comments).ids} == {0}
    assert any("requests that enter by etha are dropped" in note.text for note in plan.notes)


@pytest.mark.parametrize("ends_after", [1, 2, 3])
def test_a_killed_change_is_done_again_or_is_done(ends_after: int) -> None:
    """The move has come to its end exactly when the live comment says so."""
    before = compiled(of(plain=("a",)))
    plan = compiled(of("a"), before)
    tables = [plan.transition, plan.holding, plan.table]
    live = tables[ends_after - 1]
    assert live is not None
    comments = [value for item in live.maps if item.name == "ids" for _, value in item.elements]
    again = compile_policy(of("a"), Facts(ids=parse_ids(comments).ids, fwmark_mask=plan.fwmark_mask))
    assert bool(again.zone_changes) is (ends_after < 3)
    assert again.table == plan.table


def test_the_order_of_a_move() -> None:
    before = compiled(of(plain=("a",)))
    plan = compiled(of("a"), before)
    assert before.table is not None
    actual = Actual(
        table=as_actual(before.table),
        rules=before.rule_set,
        routes=before.route_set,
        links={"etha": ActualLink("etha", up=True)},
    )
    steps = [
        s for s in reconcile(actual, plan, Record()).steps if isinstance(s, NftTransaction | MoveConnections)
    ]
    kinds = [type(step) for step in steps]
    assert kinds == [NftTransaction, MoveConnections, NftTransaction]
    held, _, released = steps
    assert isinstance(held, NftTransaction)
    assert isinstance(released, NftTransaction)
    assert "drop" in held.text
    assert "40001" not in held.text
    assert "drop" not in released.text
    assert "40001" in released.text


def test_networks_that_come_isolated_hold_nobody_up() -> None:
    before = compiled(of(plain=("a",)))
    plan = compiled(of("b", plain=("a",)), before)
    assert plan.zone_changes == ()
    assert plan.holding is None


def test_facts_of_an_older_version_have_no_zones() -> None:
    ids = IdFacts(name="a", fwmark=0x10000, table=700001, slot=1)
    assert ids.zone == 0
    assert parse_ids(["network=a fwmark=0x00010000 table=700001 slot=1"]).ids == (ids,)


def test_old_kernels_must_not_look_for_sockets_before_nat() -> None:
    keys = {"net/ipv4/tcp_early_demux", "net/ipv4/udp_early_demux"}

    def set_by(plan: Plan) -> set[str]:
        return {setting.key for setting in plan.sysctls} & keys

    assert set_by(compiled(of("a"), stale_early_demux=True)) == keys
    assert set_by(compiled(of("a"))) == set()
    assert set_by(compiled(of(plain=("a",)), stale_early_demux=True)) == set()
    assert has_stale_early_demux("6.1.0-56-amd64")
    assert has_stale_early_demux("5.15.0")
    assert not has_stale_early_demux("6.6.1")
    assert not has_stale_early_demux("6.12.117+deb12-amd64")
    assert not has_stale_early_demux("10.0")
