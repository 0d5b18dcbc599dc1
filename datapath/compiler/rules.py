# SPDX-License-Identifier: Apache-2.0
"""The ip rules: a radix tree on the bits of the mark, so that a look-up does not walk every network.

A block looks like this (priorities from the top; `d` is the depth of the tree):

    base .. base+2      networks with `return_path: source`: exemptions, look-ups, an end
    bank                guard: unmarked traffic goes to the end of the bank
                        nodes: `goto` rules on two bits of the mark each, parents before children
                        leaves: `fwmark V/M lookup T`, up to four a node
                        end: a nop, the target of the guard

Up to three networks are three leaves and nothing else: to jump over them would cost as much as to pass them by.

Every leaf compares the whole mark, so the tree is only a short cut: a rule that is missing or extra for a
moment costs time, never a wrong answer. That is why single leaves may come and go in place. A tree of
another depth, or for another mask, is built in a bank of its own and the old bank is removed after.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from datapath.compiler.context import Context, Treatment
from datapath.compiler.vrf import emit_leaks
from datapath.plan.rtnl import Family, FibRule, RuleAction
from datapath.policy.marks import capacity, deposit, extract

#: Bits that one node decides. Four children: 2.5 rules a level on average, the least for a linear walk.
NODE_BITS = 2
_FANOUT = 1 << NODE_BITS
#: Priorities before the first bank.
SOURCE_LOOKUP = 1
SOURCE_END = 2
FIRST_BANK = 3


@dataclass(frozen=True)
class Tree:
    """Where the tree of one depth and bank stands in the block."""

    base: int
    depth: int
    bank: int

    @cached_property
    def guard(self) -> int:
        before = 2 * sum(map(_bank_size, range(self.depth)))
        return self.base + FIRST_BANK + before + self.bank * _bank_size(self.depth)

    @property
    def end(self) -> int:
        return self.guard + _bank_size(self.depth) - 1

    def node(self, level: int, prefix: int) -> int:
        """Priority of the node that holds all indexes whose leading digits are `prefix`."""
        return self.guard + 1 + _nodes_above(level) + prefix


@functools.cache
def _bank_size(depth: int) -> int:
    return _nodes_above(depth + 1) + 2


def _nodes_above(level: int) -> int:
    """Nodes of all levels before this one: a geometric sum."""
    return ((1 << NODE_BITS * level) - 1) // (_FANOUT - 1)


def tree_depth(indexes: Iterable[int]) -> int:
    """Levels of `goto` that are needed for the largest index."""
    depth = 0
    while max(indexes, default=0) >= _FANOUT ** (depth + 1):
        depth += 1
    return depth


def choose_bank(context: Context) -> int:
    """The live bank while the mask stays; the other one for a new mask, whose guard the old one would hide."""
    facts = context.facts
    if facts.rule_bank is None:
        return 0
    return facts.rule_bank if facts.fwmark_mask in (0, context.mask) else 1 - facts.rule_bank


def emit_rules(context: Context, *, rule_bank: int) -> tuple[FibRule, ...]:
    """All rules of both families, in the kernel's order."""
    base = context.policy.rules.priority
    # Both families share one shape: a network that gains a family must not move the other's rules.
    depth = tree_depth(
        [extract(network.ids.fwmark, context.mask) for network in context.networks if network.is_marked]
    )
    rules: list[FibRule] = []
    for family in Family:
        tables = {
            extract(network.ids.fwmark, context.mask): network.ids.table
            for network in context.networks
            if family in network.families(Treatment.CONNTRACK)
        }
        rules += _source_rules(context, family, base)
        if tables:
            rules += _tree_rules(tables, Tree(base, depth, rule_bank), family, context.mask)
    rules += emit_leaks(context)
    return tuple(sorted(rules, key=FibRule.sort_key))


def _source_rules(context: Context, family: Family, base: int) -> Iterator[FibRule]:
    steered = [n for n in context.networks if family in n.families(Treatment.SOURCE)]
    if not steered:
        return
    for prefix in {prefix for prefix in context.policy.node.internal if prefix.version == family}:
        yield FibRule(family, base, RuleAction.GOTO, base + SOURCE_END, destination=prefix)
    for network in steered:
        for vip in network.vip_prefixes(family):
            yield FibRule(family, base + SOURCE_LOOKUP, RuleAction.LOOKUP, network.ids.table, source=vip)
    yield FibRule(family, base + SOURCE_END, RuleAction.NOP)


def _tree_rules(tables: dict[int, int], tree: Tree, family: Family, mask: int) -> Iterator[FibRule]:
    if tree.depth:
        yield FibRule(family, tree.guard, RuleAction.GOTO, tree.end, fwmark=0, fwmask=mask)
        yield FibRule(family, tree.end, RuleAction.NOP)
    for level in range(tree.depth):
        shift = NODE_BITS * (tree.depth - level)
        digit_mask = deposit(((_FANOUT - 1) << shift) & capacity(mask), mask)
        for child in sorted({index >> shift for index in tables}):
            yield FibRule(
                family,
                tree.node(level, child >> NODE_BITS),
                RuleAction.GOTO,
                tree.node(level + 1, child),
                fwmark=deposit((child % _FANOUT) << shift, mask),
                fwmask=digit_mask,
            )
    for index, table in tables.items():
        leaf = tree.node(tree.depth, index >> NODE_BITS)
        yield FibRule(family, leaf, RuleAction.LOOKUP, table, fwmark=deposit(index, mask), fwmask=mask)
