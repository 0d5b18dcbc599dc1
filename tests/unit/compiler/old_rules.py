# SPDX-License-Identifier: Apache-2.0
"""The tree of ip rules as versions up to November 2026 wrote it: nodes that run them are upgraded under traffic."""

from __future__ import annotations

import dataclasses

from datapath.plan.model import Plan
from datapath.plan.rtnl import FibRule, RuleAction
from datapath.policy.marks import capacity, deposit, extract

_FANOUT = 4


def _above(level: int) -> int:
    return ((1 << 2 * level) - 1) // (_FANOUT - 1)


def _size(depth: int) -> int:
    return _above(depth + 1) + 2


def as_before(plan: Plan, base: int, bank: int) -> Plan:
    """The same networks and tables with rules of the old kind."""
    mask = plan.fwmark_mask
    leaves = [rule for rule in plan.rules if rule.action is RuleAction.LOOKUP and rule.fwmask]
    indexes = {extract(rule.fwmark, mask) for rule in leaves}
    depth = 0
    while max(indexes, default=0) >= _FANOUT ** (depth + 1):
        depth += 1
    guard = base + 3 + 2 * sum(map(_size, range(depth))) + bank * _size(depth)
    end = guard + _size(depth) - 1
    others = [rule for rule in plan.rules if not rule.fwmask and rule.priority < base + 3]
    rules = set(others)

    def node(level: int, prefix: int) -> int:
        return guard + 1 + _above(level) + prefix

    for leaf in leaves:
        index = extract(leaf.fwmark, mask)
        rules.add(dataclasses.replace(leaf, priority=node(depth, index >> 2)))
        for level in range(depth):
            shift = 2 * (depth - level)
            child = index >> shift
            rules.add(
                FibRule(
                    leaf.family,
                    node(level, child >> 2),
                    RuleAction.GOTO,
                    node(level + 1, child),
                    fwmark=deposit(child % _FANOUT << shift, mask),
                    fwmask=deposit((_FANOUT - 1) << shift & capacity(mask), mask),
                )
            )
        if depth:
            rules.add(FibRule(leaf.family, guard, RuleAction.GOTO, end, fwmark=0, fwmask=mask))
            rules.add(FibRule(leaf.family, end, RuleAction.NOP))
    return dataclasses.replace(plan, rules=tuple(sorted(rules, key=FibRule.sort_key)))
