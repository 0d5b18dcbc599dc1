# SPDX-License-Identifier: Apache-2.0
"""Policies of drawn marks, and every moment of a change from one to another."""

from __future__ import annotations

from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family
from datapath.policy import Policy, capacity, deposit
from datapath.reconcile.actual import Actual, Record
from datapath.reconcile.diff import reconcile
from datapath.reconcile.steps import AddRule, DeleteRule
from tests.unit.compiler.walk import RuleList, policy

BASE = 10000
#: A guard; at each of five levels three jumps, of which one may be taken; a group of four leaves.
VISITED_MAX = 1 + 3 * 5 + 4

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


def each_moment(
    old: Plan, new: Plan, rules: dict[Family, RuleList] | None = None
) -> Iterator[tuple[str, Family, RuleList]]:
    """The rules after each step of the change; `adding` until the marks switch over, `deleting` after.

    Args:
        old: where it begins.
        new: where it ends.
        rules: those of `old` in their own order of age; they become those of `new`.
    """
    steps = reconcile(Actual(rules=frozenset(old.rules)), new, Record()).steps
    adds = [step.rule for step in steps if isinstance(step, AddRule)]
    deletes = [step.rule for step in steps if isinstance(step, DeleteRule)]
    assert [type(s) for s in steps if isinstance(s, AddRule | DeleteRule)] == [AddRule] * len(adds) + [
        DeleteRule
    ] * len(deletes)
    rules = rules or {family: RuleList.of(old.rules, family) for family in Family}
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
