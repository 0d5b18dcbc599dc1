# SPDX-License-Identifier: Apache-2.0
"""The tree of ip rules: every mark finds its table, in few steps, and at every moment of a change."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.compiler import compile_policy
from datapath.errors import CompileError
from datapath.facts import Facts
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family, RuleAction
from datapath.policy import RULE_BLOCK_SIZE, Policy, Rules
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

FULL = 0xFFFFFFFF
LEAVES_WITHOUT_GUARD = 3


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
        for jump in (rule for rule in plan.rules if rule.action is RuleAction.GOTO):
            assert jump.priority < jump.target <= max(priorities)
            leads = any(not (mark ^ jump.fwmark) & jump.fwmask for mark in tables_of(plan))
            assert not leads or jump.target in priorities, "a jump of marks that are ours leads to a rule"


def spans(plan: Plan) -> set[tuple[int, int]]:
    """First and last priority of the trees, or of the leaves where there is none."""
    guards = [rule for rule in plan.rules if rule.fwmask == plan.fwmark_mask and rule.fwmark == 0]
    assert all(guard.action is RuleAction.GOTO for guard in guards)
    leaves = {rule.priority for rule in plan.rules if rule.action is RuleAction.LOOKUP}
    assert guards or len(leaves) == 1
    return {(guard.priority, guard.target) for guard in guards} or {(min(leaves), max(leaves))}


@fast
@given(st.data(), MASKS, MASKS, st.integers(0, 1))
def test_banks_never_overlap(data: st.DataObject, mask: int, other: int, bank: int) -> None:
    """Nor does a bank overlap what an earlier version had in the same one, whatever the marks."""
    indexes, others = data.draw(index_sets(mask)), data.draw(index_sets(other))
    plan = compiled(mask, indexes, Facts(rule_bank=bank, fwmark_mask=mask))
    elsewhere = compiled(other, others, Facts(rule_bank=1 - bank, fwmark_mask=other))
    earlier = as_before(compiled(other, others), BASE, bank)
    apart = spans(elsewhere) | (spans(earlier) if len(spans(earlier) | spans(plan)) > 1 else set())
    for first, last in spans(plan):
        assert not [span for span in apart if span[0] <= last and first <= span[1]]


def test_the_bank_is_remembered_by_the_table() -> None:
    """As before; and what holds a tree says so, because an earlier version's stands elsewhere."""
    mask = 0xFFF0000
    few, many = compiled(mask, [1, 2, 3]), compiled(mask, [1, 2, 4])
    assert [(f.rule_bank, f.has_rule_tree) for f in map(facts_after, (few, many))] == [(0, False), (0, True)]
    moved = facts_after(compiled(0xFFF, [1, 2, 4], facts_after(many)))
    assert (moved.rule_bank, moved.has_rule_tree) == (1, True)
    upgraded = compiled(0xFFF, [1, 2, 4], facts_after(many).model_copy(update={"has_rule_tree": False}))
    assert facts_after(upgraded).rule_bank == 0


def test_a_thousand_networks_stay_cheap() -> None:
    plan = compile_policy(policy({} for _ in range(1000)), Facts())
    marks = tables_of(plan)
    assert len(marks) == 1000
    for family in Family:
        rules = RuleList.of(plan.rules, family)
        assert max(rules.look_up(mark)[1] for mark in sorted(marks)[::37]) <= 1 + 3 * 4 + 4


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
