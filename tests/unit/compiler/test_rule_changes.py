# SPDX-License-Identifier: Apache-2.0
"""The tree of ip rules while it changes: at every moment every mark finds its own table, and in few steps after it."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family, RuleAction
from datapath.policy import Rules
from datapath.reconcile.actual import Actual, ActualLink, ForeignRule
from datapath.reconcile.conflicts import find_conflicts
from datapath.reconcile.present import needed_devices
from tests.unit.compiler.changes import (
    BASE,
    MASKS,
    VISITED_MAX,
    compiled,
    each_moment,
    fast,
    index_sets,
    pinned,
)
from tests.unit.compiler.old_rules import as_before
from tests.unit.compiler.walk import RuleList, facts_after, policy, tables_of

#: Of a block: a little, far away, and to where an end of today is one of before or the other bank's.
SHIFTS = st.one_of(st.integers(-60, 60), st.integers(-9000, 9000), st.sampled_from((-1800, 1800, -433, 1367)))


@st.composite
def halves(draw: st.DrawFn, bits: set[int]) -> tuple[int, int]:
    """Two masks that share no bit."""
    ordered = sorted(bits)
    some = draw(st.sets(st.sampled_from(ordered), min_size=1, max_size=len(ordered) - 1))
    return sum(1 << bit for bit in some), sum(1 << bit for bit in bits - some)


def upgraded(old: Plan, bank: int) -> tuple[Plan, Facts]:
    """The node as an earlier version left it, and what is read back from that."""
    facts = facts_after(old).model_copy(update={"rule_bank": bank, "has_rule_tree": False})
    return as_before(old, BASE, bank), facts


def refusals(old: Plan, new: Plan) -> tuple[str, ...]:
    links = {name: ActualLink(name, up=True) for name in needed_devices(new)}
    return find_conflicts(Actual(rules=frozenset(old.rules), links=links), new)


@fast
@given(st.data(), MASKS)
def test_any_rules_and_any_order_find_the_same(data: st.DataObject, mask: int) -> None:
    """Leaves that are there are found, whichever jumps are missing and however old the rules of a priority are."""
    plan = compiled(mask, data.draw(index_sets(mask)))
    rules = [rule for rule in plan.rules if rule.family is Family.IPV4]
    some = data.draw(st.lists(st.sampled_from(rules), unique=True))
    walk = RuleList.of(some, Family.IPV4)
    there = {rule.fwmark: rule.target for rule in some if rule.action is RuleAction.LOOKUP}
    for mark in tables_of(plan):
        assert walk.look_up(mark)[0] == there.get(mark, 0)
    assert walk.look_up(0)[0] == 0


@fast
@given(st.data(), MASKS)
def test_history_makes_no_walk_longer(data: st.DataObject, mask: int) -> None:
    """A rule that comes later stands behind others of its priority: never behind what it leads past."""
    plan = compiled(mask, data.draw(index_sets(mask)))
    rules = {family: RuleList.of(plan.rules, family) for family in Family}
    for _ in range(data.draw(st.integers(1, 4))):
        before, plan = plan, compiled(mask, data.draw(index_sets(mask)), facts_after(plan))
        for _ in each_moment(before, plan, rules):
            pass
        for walk in rules.values():
            assert max(walk.look_up(mark)[1] for mark in tables_of(plan)) <= VISITED_MAX


def test_the_kernel_deletes_the_jump_that_is_meant() -> None:
    """Mark 0 in a deletion stands for any: the jump to the lowest child must be the oldest of its node."""
    plan = compiled(0xFFF0000, [4])
    rules = {family: RuleList.of(plan.rules, family) for family in Family}
    for indexes in ([1, 4], [4], [4, 8, 12], [8, 12], [1, 12], [12]):
        before, plan = plan, compiled(0xFFF0000, indexes, facts_after(plan))
        for _, _, walk in each_moment(before, plan, rules):
            assert walk.look_up(0)[0] == 0


@pytest.mark.parametrize("levels", [1, 2])
def test_lower_marks_that_come_later_walk_no_longer(levels: int) -> None:
    """The jumps of a node are older than what stands behind them, also where their marks come last."""
    mask, room, quarter = 0xFFF0000, 4 * 4**levels, 4**levels
    plan = compiled(mask, list(range(quarter, room)))
    rules = {family: RuleList.of(plan.rules, family) for family in Family}
    for indexes in (range(1, room), range(3 * quarter, room), range(1, room)):
        before, plan = plan, compiled(mask, list(indexes), facts_after(plan))
        for _ in each_moment(before, plan, rules):
            pass
    for walk in rules.values():
        assert max(walk.look_up(mark)[1] for mark in tables_of(plan)) == 1 + 3 * levels + 4


@pytest.mark.parametrize(
    ("networks", "expected"), [(3, 8), (4, 1), (15, 5), (16, 1), (63, 6), (255, 7), (256, 1)]
)
def test_one_more_network_is_some_rules_of_its_own(networks: int, expected: int) -> None:
    """Also where the tree gets a level more: nobody else's leaf moves, but those of the first three once."""
    mask = 0xFFF0000
    old = compiled(mask, list(range(1, networks + 1)))
    new = compiled(mask, list(range(1, networks + 2)), facts_after(old))
    added, removed = set(new.rules) - set(old.rules), set(old.rules) - set(new.rules)
    leaves = [rule for rule in removed if rule.action is RuleAction.LOOKUP]
    assert len(leaves) == (2 * networks if networks == 3 else 0)
    assert all(rule.fwmark == 0 and rule.fwmask == mask for rule in removed - set(leaves)), "guards only"
    assert len(added) == 2 * expected


@fast
@given(st.data(), MASKS, st.integers(0, 1), st.booleans())
def test_upgrade_is_hitless(data: st.DataObject, mask: int, bank: int, is_interrupted: bool) -> None:
    """From the tree of an earlier version to ours, with other networks, whichever of our jumps are missing."""
    old, facts = upgraded(compiled(mask, data.draw(index_sets(mask))), bank)
    new = compiled(mask, data.draw(index_sets(mask)), facts)
    assert refusals(old, new) == ()
    before, after = tables_of(old), tables_of(new)
    both = {mark: table for mark, table in after.items() if before.get(mark) == table}
    assert set(both) == set(before) & set(after)
    jumps = [r for r in new.rules if r.action is RuleAction.GOTO and r.fwmask]
    missing = (
        frozenset(data.draw(st.lists(st.sampled_from(jumps)))) if is_interrupted and jumps else frozenset()
    )
    for _, _, rules in each_moment(old, new):
        walk = RuleList([rule for rule in rules.rules if rule not in missing])
        for mark, table in both.items():
            assert walk.look_up(mark)[0] == table
        assert walk.look_up(0)[0] == 0


@fast
@given(st.data(), st.sets(st.integers(0, 31), min_size=2, max_size=16), st.integers(0, 1))
def test_upgrade_with_another_mask_is_hitless(data: st.DataObject, bits: set[int], bank: int) -> None:
    old_mask, new_mask = data.draw(halves(bits))
    old, facts = upgraded(compiled(old_mask, data.draw(index_sets(old_mask))), bank)
    new = compiled(new_mask, data.draw(index_sets(new_mask)), facts)
    for phase, _, rules in each_moment(old, new):
        for mark, table in tables_of(old if phase == "adding" else new).items():
            assert rules.look_up(mark)[0] == table
        assert rules.look_up(0)[0] == 0


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
@given(st.data(), MASKS, SHIFTS, st.sampled_from((None, 0, 1)))
def test_change_of_priority_is_hitless(
    data: st.DataObject, mask: int, shift: int, earlier: int | None
) -> None:
    """Where the new tree overlaps the old one, the change is refused: jumps of one would land among the other."""
    subject = pinned(mask, data.draw(index_sets(mask)))
    old = compile_policy(subject, Facts())
    facts = facts_after(old)
    if earlier is not None:
        old, facts = upgraded(old, earlier)
    moved = pinned(mask, data.draw(index_sets(mask))).model_copy(
        update={"rules": Rules(priority=BASE + shift)}
    )
    new = compile_policy(moved, facts)
    refused = refusals(old, new)
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
        conflicts = refusals(old, new)
        assert bool(conflicts) is is_refused, (shift, conflicts)


@fast
@given(st.data(), st.sets(st.integers(0, 31), min_size=2, max_size=16), st.integers(0, 1))
def test_change_to_a_disjoint_mask_is_hitless(data: st.DataObject, bits: set[int], bank: int) -> None:
    """Old marks find their tables until the switch, new ones after it, with both guards in place."""
    old_mask, new_mask = data.draw(halves(bits))
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


def test_a_move_to_the_end_of_an_earlier_tree_is_refused() -> None:
    """The same end alone is not the same tree."""
    old, facts = upgraded(compiled(0xFFF0000, [1, 2000]), 0)
    moved = pinned(0xFFF0000, [1, 2000]).model_copy(update={"rules": Rules(priority=BASE + 2295 - 4095)})
    new = compile_policy(moved, facts)
    assert max(rule.priority for rule in new.rules) == max(rule.priority for rule in old.rules)
    assert "onto themselves" in refusals(old, new)[0]


@pytest.mark.parametrize(
    ("priority", "is_refused"),
    [
        *((BASE + offset, True) for offset in (0, 1, 2, 4090, 4092, 4095)),
        *((BASE + offset, False) for offset in (-1, 3, 4, 2295, 4089, 4096)),
    ],
)
def test_a_rule_of_others_is_refused_where_our_jumps_lead_across_it(priority: int, is_refused: bool) -> None:
    """And among ours: between the exemptions for sources and the tree there is nothing."""
    networks = [*({} for _ in range(5)), {"return_path": "source"}]
    plan = compile_policy(policy(networks, node={"internal": ["10.112.0.0/12", "fd00::/8"]}), Facts())
    for family in Family:
        rule = ForeignRule(family, priority, 0, 0, 77, 0, "somebody's")
        links = {name: ActualLink(name, up=True) for name in needed_devices(plan)}
        conflicts = find_conflicts(Actual(foreign_rules=(rule,), links=links), plan)
        assert bool(conflicts) is is_refused
        assert all("inside our block" in text for text in conflicts)
