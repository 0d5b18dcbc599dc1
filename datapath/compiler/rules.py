# SPDX-License-Identifier: Apache-2.0
"""The ip rules: a radix tree on the bits of the mark, so that a look-up does not walk every network.

A block looks like this (priorities from the top):

    base .. base+2      networks with `return_path: source`: exemptions, look-ups, an end
    base+4, base+7      up to three networks, by bank: leaves and nothing else
    bank                guard: unmarked traffic goes to the end of the bank
                        groups of four leaves (`fwmark V/M lookup T`), the highest marks first, one priority each;
                        before its leaves a group has the nodes that have it as their last
                        end: a nop, the target of the guard

A node is three jumps, one for each quarter of its marks but the highest, which stands right behind it. A jump takes
exactly the marks of its quarter, so it never leads past a leaf of what it takes, whichever other rules are there; and
every leaf compares the whole mark. A rule that is missing or extra for a moment costs time, never a wrong answer, and
single rules may come and go in place. The end of a bank is fixed, and the tree grows away from it: a level more is one
node more, and another guard. A tree for another mask is built in the other bank, and the old one is removed after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from datapath.compiler.context import Context, Treatment
from datapath.compiler.vrf import emit_leaks
from datapath.plan.rtnl import Family, FibRule, RuleAction
from datapath.policy.marks import capacity, deposit, extract
from datapath.policy.model import RULE_BLOCK_SIZE

#: Bits that the leaves of a group differ in.
GROUP_BITS = 2
#: Bits that one node decides. A jump that is taken costs as much as a dozen that are not: with one bit there would
#: be a third more to take, with three the walk would be a third longer.
NODE_BITS = 2
_FANOUT = 1 << NODE_BITS
SOURCE_LOOKUP = 1
SOURCE_END = 2
#: Where the only group of up to three networks stands, by bank.
_ONE_GROUP = (4, 7)
#: Last priority of the tree, by bank. Earlier versions had trees at 9..2295 (bank 0) and 16..3662 (bank 1), with other
#: jumps. Each bank is clear of what it held then, and of the other one as it is now.
_ENDS = (RULE_BLOCK_SIZE - 1, 2295)


@dataclass(frozen=True)
class Tree:
    """Where the tree of a bank stands, and how many groups it has room for: a power of four."""

    end: int
    groups: int

    @property
    def guard(self) -> int:
        return self.group(self.groups)

    def group(self, number: int) -> int:
        """Priority of the leaves of a group, and of the nodes that have it as their last."""
        return self.end - 1 - number


def choose_bank(context: Context) -> int:
    """The live bank while the mask stays; the other one for a new mask, whose guard the old one would hide.

    What is not a tree of ours makes no difference: up to three leaves hide nothing, and a tree of an earlier
    version is elsewhere.
    """
    facts = context.facts
    if facts.rule_bank is None:
        return 0
    moves = facts.has_rule_tree and facts.fwmark_mask not in (0, context.mask)
    return 1 - facts.rule_bank if moves else facts.rule_bank


def group_count(context: Context) -> int:
    """How many groups the tree has room for; with one there is none."""
    # Both families share one shape: a network that gains a family must not move the other's rules.
    indexes = [extract(n.ids.fwmark, context.mask) for n in context.networks if n.is_marked]
    last, groups = max(indexes, default=0) >> GROUP_BITS, 1
    while groups <= last:
        groups *= _FANOUT
    return groups


def emit_rules(context: Context, *, rule_bank: int) -> tuple[FibRule, ...]:
    """All rules of both families, in the kernel's order."""
    base, mask = context.policy.rules.priority, context.mask
    tree = Tree(base + _ENDS[rule_bank], group_count(context))
    rules: list[FibRule] = []
    for family in Family:
        tables = {
            extract(network.ids.fwmark, mask): network.ids.table
            for network in context.networks
            if family in network.families(Treatment.CONNTRACK)
        }
        rules += _source_rules(context, family, base)
        if tree.groups == 1:
            priority = base + _ONE_GROUP[rule_bank]
            rules += [_leaf(family, priority, index, table, mask) for index, table in tables.items()]
        elif tables:
            rules += _tree_rules(tables, tree, family, mask)
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
    yield FibRule(family, tree.guard, RuleAction.GOTO, tree.end, fwmark=0, fwmask=mask)
    yield FibRule(family, tree.end, RuleAction.NOP)
    for index, table in tables.items():
        yield _leaf(family, tree.group(index >> GROUP_BITS), index, table, mask)
    span, children = 1, {index >> GROUP_BITS for index in tables}
    while span < tree.groups:
        yield from _level(tree, family, mask, span, children)
        span, children = span * _FANOUT, {child >> NODE_BITS for child in children}


def _level(tree: Tree, family: Family, mask: int, span: int, children: set[int]) -> Iterator[FibRule]:
    """The nodes whose children hold `span` groups each; `children` are those with leaves, from the lowest marks on."""
    compared = deposit(capacity(mask) & -(span << GROUP_BITS), mask)
    for node, highest in {child >> NODE_BITS: child for child in sorted(children)}.items():
        first = node << NODE_BITS
        last = first + _FANOUT - 1
        # A jump that comes later than what it leads past stands behind it for ever, at the same priority. So with a
        # child come the jumps of all lower ones, also those that lead to nothing yet. Where we say mark 0 the kernel
        # deletes the oldest jump of that mask: that of the lowest child, always the first to come and the last to go.
        for child in range(first, min(highest + 1, last)):
            yield FibRule(
                family,
                tree.group((last + 1) * span - 1),
                RuleAction.GOTO,
                tree.group((child + 1) * span - 1),
                fwmark=deposit(child * span << GROUP_BITS, mask),
                fwmask=compared,
            )


def _leaf(family: Family, priority: int, index: int, table: int, mask: int) -> FibRule:
    return FibRule(family, priority, RuleAction.LOOKUP, table, fwmark=deposit(index, mask), fwmask=mask)
