# SPDX-License-Identifier: Apache-2.0
"""The kernel's walk over ip rules, in Python (net/core/fib_rules.c), and policies to compile for it."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from operator import attrgetter
from typing import Any

from datapath.facts import Facts, IdFacts
from datapath.kernel.ids import parse_ids
from datapath.plan.model import Plan
from datapath.plan.nft import IDS
from datapath.plan.rtnl import Family, FibRule, RuleAction
from datapath.policy import Policy


@dataclass
class RuleList:
    """The rules of one family, in the kernel's order: by priority, then by age."""

    rules: list[FibRule] = field(default_factory=list)

    @classmethod
    def of(cls, rules: Iterable[FibRule], family: Family) -> RuleList:
        made = cls()
        for rule in rules:
            if rule.family is family:
                made.add(rule)
        return made

    def add(self, rule: FibRule) -> None:
        """`fib_nl_newrule`: behind all rules of the same priority; a second equal one is refused."""
        there = [r for r in self.rules if r.priority == rule.priority]
        assert not any(_same_but_target(r, rule) for r in there), "the kernel says that it exists"
        place = next((i for i, r in enumerate(self.rules) if r.priority > rule.priority), len(self.rules))
        self.rules.insert(place, rule)

    def delete(self, rule: FibRule) -> None:
        """`fib_nl_delrule`: the first that is like it; no mark stands for any mark."""
        found = next(r for r in self.rules if _may_be_meant(rule, r))
        assert found == rule, "the kernel deletes another rule"
        self.rules.remove(found)

    def look_up(self, fwmark: int, source: str = "", destination: str = "") -> tuple[int, int]:
        """The table that answers (0: main, after all of ours) and the number of rules looked at.

        Each of our tables ends with an unreachable default, so the first look-up is the last.
        """
        visited, position = 0, 0
        while position < len(self.rules):
            rule = self.rules[position]
            visited += 1
            position += 1
            if not _matches(rule, fwmark, source, destination):
                continue
            if rule.action is RuleAction.LOOKUP:
                return rule.target, visited
            if rule.action is RuleAction.GOTO:
                position = self._target(rule, position)
        return 0, visited

    def _target(self, rule: FibRule, following: int) -> int:
        """The first rule of the target priority; an unresolved goto is passed over."""
        assert rule.target > rule.priority, "the kernel refuses to go backwards"
        place = bisect.bisect_left(self.rules, rule.target, key=attrgetter("priority"))
        is_there = place < len(self.rules) and self.rules[place].priority == rule.target
        return place if is_there else following


def _same_but_target(one: FibRule, other: FibRule) -> bool:
    """`rule_exists` compares the table of a look-up, and not where a jump leads."""
    is_lookup = one.action is RuleAction.LOOKUP
    return one == (other if is_lookup else dataclasses.replace(other, target=one.target))


def _may_be_meant(asked: FibRule, rule: FibRule) -> bool:
    """`rule_find`: what was not said is not compared."""
    if (asked.priority, asked.action) != (rule.priority, rule.action):
        return False
    if asked.action is RuleAction.LOOKUP and asked.target != rule.target:
        return False
    said = (asked.fwmark, asked.fwmask, asked.source, asked.destination)
    have = (rule.fwmark, rule.fwmask, rule.source, rule.destination)
    return all(not word or word == other for word, other in zip(said, have, strict=True))


def _matches(rule: FibRule, fwmark: int, source: str, destination: str) -> bool:
    if (fwmark ^ rule.fwmark) & rule.fwmask:
        return False
    return all(
        network is None or (address != "" and ip_address(address) in network)
        for network, address in ((rule.source, source), (rule.destination, destination))
    )


def policy(networks: Iterable[Mapping[str, Any]], **top: Any) -> Policy:
    """A policy of networks with a gateway in both families; what the test sets wins."""
    filled = []
    for number, network in enumerate(networks):
        v4, v6 = f"10.{number >> 8}.{number & 255}", f"2001:db8:{number:x}:"
        filled.append(
            {
                "name": f"n{number}",
                "interface": f"eth{number}",
                "vips": [f"{v4}.0/24", f"{v6}:/64"],
                "gateway": [f"{v4}.1", f"{v6}:1"],
            }
            | dict(network)
        )
    return Policy.model_validate({"version": 1, "networks": filled} | top)


def facts_after(plan: Plan) -> Facts:
    """What the next compilation reads back from a kernel that has this plan."""
    if plan.table is None:
        return Facts()
    header = next(chain for chain in plan.table.chains if chain.name == IDS)
    ids = next(item for item in plan.table.maps if item.name == IDS)
    live = parse_ids([*(rule.comment for rule in header.rules), *dict(ids.elements).values()])
    return Facts(
        ids=live.ids,
        fwmark_mask=live.fwmark_mask,
        rule_bank=live.rule_bank,
        has_rule_tree=live.has_rule_tree,
    )


def tables_of(plan: Plan) -> dict[int, int]:
    """Table by mark, of the networks that have one."""
    return {ids.fwmark: ids.table for ids in plan.ids if ids.fwmark}


def known(plan: Plan) -> tuple[IdFacts, ...]:
    """The plan's ids in the shape of facts."""
    return tuple(IdFacts(name=i.name, fwmark=i.fwmark, table=i.table, slot=i.slot) for i in plan.ids)
