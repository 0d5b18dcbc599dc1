# SPDX-License-Identifier: Apache-2.0
"""The tree of ip rules: every mark finds its table, in few steps, and at every moment of a change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from datapath.compiler import compile_policy
from datapath.errors import CompileError
from datapath.facts import Facts
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family, RuleAction
from datapath.policy import RULE_BLOCK_SIZE, Policy, Rules, capacity, deposit
from datapath.reconcile.actual import Actual, ActualLink, Record
from datapath.reconcile.conflicts import find_conflicts
from datapath.reconcile.diff import reconcile
from datapath.reconcile.present import needed_devices
from datapath.reconcile.steps import AddRule, DeleteRule
from tests.unit.compiler.walk import RuleList, facts_after, policy, tables_of

FULL = 0xFFFFFFFF
BASE = 10000
#: One guard, then at most four rules a level: three of them say no before the fourth says where to go.
LEVELS = 6
VISITED_MAX = 1 + 4 * LEVELS
LEAVES_WITHOUT_GUARD = 3

MASKS = st.sets(st.integers(0, 31), min_size=1, max_size=16).map(lambda bits: sum(1 << bit for bit in bits))
INDEXES = st.one_of(st.integers(1, 20), st.integers(1, 300), st.integers(1, 4095))

fast = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def index_sets(draw: st.DrawFn, mask: int, max_size: int = 12) -> list[int]:
    room = min(capacity(mask), 4095)
    drawn = draw(st.sets(INDEXES.map(lambda index: 1 + (index - 1) % room), min_size=1, max_size=max_size))
    return sorted(drawn)


def pinned(mask: int, indexes: list[int]) -> Policy:
    """A network of its own name for each index, so that two policies share those that both have."""
    networks = [{"name": f"n{index}", "mark": deposit(index, mask)} for index in sorted(indexes)]
    return policy(networks, marks={"mask": mask})


def compiled(mask: int, indexes: list[int], facts: Facts | None = None) -> Plan:
    return compile_policy(pinned(mask, indexes), facts or Facts())


@fast
@given(st.data(), MASKS)
def test_every_mark_finds_its_own_table_in_few_steps(data: st.DataObject, mask: int) -> None:
    plan = compiled(mask, data.draw(index_sets(mask)))
    others = data.draw(st.integers(0, FULL)) & ~mask
    for family in Family:
        rules = RuleList.of(plan.rules, family)
        for mark, table in tables_of(plan).items():
            found, visited = rules.look_up(mark | others)
            assert found == table
            assert visited <= VISITED_MAX


@fast
@given(st.data(), MASKS)
def test_no_other_mark_finds_a_table(data: st.DataObject, mask: int) -> None:
    plan = compiled(mask, data.draw(index_sets(mask)))
    mark = data.draw(st.integers(0, FULL))
    expected = tables_of(plan).get(mark & mask, 0)
    for family in Family:
        rules = RuleList.of(plan.rules, family)
        assert rules.look_up(mark)[0] == expected
        table, visited = rules.look_up(mark & ~mask)
        assert table == 0
        # The guard and the end, or up to three leaves: what everybody else's packets pay.
        assert visited <= LEAVES_WITHOUT_GUARD


@fast
@given(st.data(), MASKS, st.integers(1, 28669))
def test_all_priorities_lie_in_the_block(data: st.DataObject, mask: int, base: int) -> None:
    indexes = data.draw(index_sets(mask))
    subject = pinned(mask, indexes).model_copy(update={"rules": Rules(priority=base)})
    for bank in (0, 1):
        plan = compile_policy(subject, Facts(rule_bank=bank, fwmark_mask=mask))
        priorities = {rule.priority for rule in plan.rules}
        assert min(priorities) >= base
        assert max(priorities) < base + RULE_BLOCK_SIZE
        assert all(r.target in priorities for r in plan.rules if r.action is RuleAction.GOTO)


@fast
@given(st.data(), MASKS, MASKS)
def test_banks_and_depths_never_overlap(data: st.DataObject, mask: int, other: int) -> None:
    """Two trees are apart, or they are the same tree of one depth and bank."""
    spans = set()
    for bits in (mask, other):
        indexes = data.draw(index_sets(bits))
        for bank in (0, 1):
            plan = compiled(bits, indexes, Facts(rule_bank=bank, fwmark_mask=bits))
            guards = [r for r in plan.rules if r.fwmask == bits and r.fwmark == 0]
            assert all(guard.action is RuleAction.GOTO for guard in guards)
            leaves = {r.priority for r in plan.rules if r.action is RuleAction.LOOKUP}
            assert guards or len(leaves) == 1
            spans |= {(guard.priority, guard.target) for guard in guards} or {(min(leaves), max(leaves))}
    for first, last in spans:
        assert [span for span in spans if span[0] <= last and first <= span[1]] == [(first, last)]


def each_moment(old: Plan, new: Plan) -> Iterator[tuple[str, Family, RuleList]]:
    """The rules after each step of the change; `adding` until the marks switch over, `deleting` after."""
    steps = reconcile(Actual(rules=frozenset(old.rules)), new, Record()).steps
    adds = [step.rule for step in steps if isinstance(step, AddRule)]
    deletes = [step.rule for step in steps if isinstance(step, DeleteRule)]
    assert [type(s) for s in steps if isinstance(s, AddRule | DeleteRule)] == [AddRule] * len(adds) + [
        DeleteRule
    ] * len(deletes)
    rules = {family: RuleList.of(old.rules, family) for family in Family}
    for family in Family:
        yield "adding", family, rules[family]
    for rule in adds:
        rules[rule.family].add(rule)
        yield "adding", rule.family, rules[rule.family]
    for family in Family:
        yield "deleting", family, rules[family]
    for rule in deletes:
        rules[rule.family].delete(rule)
        yield "deleting", rule.family, rules[rule.family]
    for family in Family:
        assert set(rules[family].rules) == {rule for rule in new.rules if rule.family is family}


@fast
@given(st.data(), MASKS)
def test_same_mask_change_is_hitless(data: st.DataObject, mask: int) -> None:
    """Any prefix of the steps: marks that both policies serve find their table, the unmarked find none."""
    bank = data.draw(st.integers(0, 1))
    old = compiled(mask, data.draw(index_sets(mask)), Facts(rule_bank=bank, fwmark_mask=mask))
    new = compiled(mask, data.draw(index_sets(mask)), facts_after(old))
    before, after = tables_of(old), tables_of(new)
    both = {mark: table for mark, table in after.items() if before.get(mark) == table}
    assert set(both) == set(before) & set(after), "tables of networks that stay do not move"
    for _, _, rules in each_moment(old, new):
        for mark, table in both.items():
            assert rules.look_up(mark)[0] == table
        assert rules.look_up(0)[0] == 0


@fast
@given(st.data(), MASKS, st.one_of(st.integers(-60, 60), st.integers(-9000, 9000)))
def test_change_of_priority_is_hitless(data: st.DataObject, mask: int, shift: int) -> None:
    """Where the new tree overlaps the old one, the change is refused: jumps of one would land among the other."""
    subject = pinned(mask, data.draw(index_sets(mask)))
    old = compile_policy(subject, Facts())
    moved = pinned(mask, data.draw(index_sets(mask))).model_copy(
        update={"rules": Rules(priority=BASE + shift)}
    )
    new = compile_policy(moved, facts_after(old))
    links = {name: ActualLink(name, up=True) for name in needed_devices(new)}
    refused = find_conflicts(Actual(rules=frozenset(old.rules), links=links), new)
    assert all("onto themselves" in text for text in refused)
    assume(not refused)
    before, after = tables_of(old), tables_of(new)
    both = {mark: table for mark, table in after.items() if before.get(mark) == table}
    for _, _, rules in each_moment(old, new):
        for mark, table in both.items():
            assert rules.look_up(mark)[0] == table
        assert rules.look_up(0)[0] == 0


def test_a_move_onto_itself_is_refused_and_a_long_one_is_not() -> None:
    old = compile_policy(pinned(0xFFF0000, [1, 256]), Facts())
    for shift, is_refused in ((0, False), (1, True), (-1, True), (4000, False)):
        moved = pinned(0xFFF0000, [1, 256]).model_copy(update={"rules": Rules(priority=BASE + shift)})
        new = compile_policy(moved, facts_after(old))
        links = {name: ActualLink(name, up=True) for name in needed_devices(new)}
        conflicts = find_conflicts(Actual(rules=frozenset(old.rules), links=links), new)
        assert bool(conflicts) is is_refused, (shift, conflicts)


@fast
@given(st.data(), st.sets(st.integers(0, 31), min_size=2, max_size=16), st.integers(0, 1))
def test_change_to_a_disjoint_mask_is_hitless(data: st.DataObject, bits: set[int], bank: int) -> None:
    """Old marks find their tables until the switch, new ones after it, with both guards in place."""
    ordered = sorted(bits)
    of_old = data.draw(st.sets(st.sampled_from(ordered), min_size=1, max_size=len(ordered) - 1))
    old_mask = sum(1 << bit for bit in of_old)
    new_mask = sum(1 << bit for bit in bits - of_old)
    indexes = data.draw(index_sets(old_mask))
    old = compiled(old_mask, indexes, Facts(rule_bank=bank, fwmark_mask=old_mask))
    new = compiled(new_mask, data.draw(index_sets(new_mask)), facts_after(old))
    before, after = tables_of(old), tables_of(new)
    for phase, _, rules in each_moment(old, new):
        for mark, table in (before if phase == "adding" else after).items():
            assert rules.look_up(mark)[0] == table
        assert rules.look_up(0)[0] == 0


@fast
@given(st.data(), MASKS, MASKS)
def test_any_mask_change_ends_right(data: st.DataObject, old_mask: int, new_mask: int) -> None:
    old = compiled(old_mask, data.draw(index_sets(old_mask)))
    new = compiled(new_mask, data.draw(index_sets(new_mask)), facts_after(old))
    for _, family, rules in each_moment(old, new):
        last = {family: rules}
    for family in Family:
        rules = last.get(family) or RuleList.of(new.rules, family)
        for mark, table in tables_of(new).items():
            assert rules.look_up(mark)[0] == table


def test_a_thousand_networks_stay_cheap() -> None:
    plan = compile_policy(policy({} for _ in range(1000)), Facts())
    marks = tables_of(plan)
    assert len(marks) == 1000
    for family in Family:
        rules = RuleList.of(plan.rules, family)
        assert max(rules.look_up(mark)[1] for mark in sorted(marks)[::37]) <= 1 + 4 * 5


@pytest.mark.parametrize("index", [4096, 0xFFFF])
def test_a_pinned_mark_beyond_the_tree_is_refused(index: int) -> None:
    """Its rules would lie outside of our 4,096 priorities, among those of others."""
    mask = 0xFFFF0000
    with pytest.raises(CompileError) as caught:
        compiled(mask, [1, index])
    (problem,) = caught.value.problems
    assert problem.path == ("networks", 1, "mark")
    assert "4095" in problem.message


def test_a_read_back_mark_beyond_the_tree_is_not_believed() -> None:
    mask = 0xFFFF0000
    before = facts_after(compiled(mask, [1]))
    (ids,) = before.ids
    facts = before.model_copy(update={"ids": (dataclasses.replace(ids, fwmark=0xFFFF0000),)})
    plan = compile_policy(policy([{"name": "n1"}], marks={"mask": mask}), facts)
    assert max(rule.priority for rule in plan.rules) < BASE + RULE_BLOCK_SIZE


def source_policy(**top: object) -> Policy:
    return policy([{"return_path": "source"}], **top)


def test_source_rules_send_the_vips_but_not_to_the_inside() -> None:
    plan = compile_policy(source_policy(node={"internal": ["10.112.0.0/12", "fd00::/8"]}), Facts())
    (ids,) = plan.ids
    assert ids.fwmark == 0
    v4, v6 = (RuleList.of(plan.rules, family) for family in Family)
    assert v4.look_up(0, "10.0.0.7", "198.51.100.1")[0] == ids.table
    assert v4.look_up(0, "10.0.0.7", "10.112.3.4")[0] == 0
    assert v4.look_up(0, "192.0.2.1", "198.51.100.1")[0] == 0
    assert v6.look_up(0, "2001:db8::7", "2001:db8:ffff::1")[0] == ids.table
    assert v6.look_up(0, "2001:db8::7", "fd00::1")[0] == 0


def test_pods_reach_the_vips_while_source_rules_come_and_go() -> None:
    """The exemption of the inside is there before the first look-up, and until the last one is gone."""
    nothing = Plan(0)
    plan = compile_policy(source_policy(node={"internal": ["10.112.0.0/12", "fd00::/8"]}), Facts())
    for old, new in ((nothing, plan), (plan, nothing)):
        for _, family, rules in each_moment(old, new):
            pod, vip = ("10.112.3.4", "10.0.0.7") if family is Family.IPV4 else ("fd00::4", "2001:db8::7")
            assert rules.look_up(0, vip, pod)[0] == 0
