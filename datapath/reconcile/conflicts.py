# SPDX-License-Identifier: Apache-2.0
"""What of others is in the way of a plan. We refuse rather than take over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from datapath.plan.ingress import VlanProtocol
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family, FibRule, RuleAction
from datapath.reconcile.actual import Actual, ForeignRule, Record
from datapath.reconcile.unchanged import Unchanged
from datapath.reconcile.vrf_conflicts import vrf_conflicts

FULL_MASK = 0xFFFFFFFF
#: The kernel's own rules for local, main and default.
_KERNEL_PRIORITIES = frozenset({0, 32766, 32767})

_without: Final[Unchanged[tuple[str, ...]]] = Unchanged()


def find_conflicts(actual: Actual, desired: Plan, record: Record = Record()) -> tuple[str, ...]:  # noqa: B008
    """One sentence per conflict, naming the other owner; empty where the plan may be applied."""
    found = _without.of(actual, desired, record)
    if found is None:
        found = _find_conflicts(actual, desired, record)
        if found:
            _without.forget()
        else:
            _without.keep(actual, desired, record, found)
    return found


def _find_conflicts(actual: Actual, desired: Plan, record: Record) -> tuple[str, ...]:
    return (
        *_rule_conflicts(actual, desired),
        *_overlaps(actual, desired),
        *_mark_conflicts(actual, desired),
        *_table_conflicts(actual, desired),
        *_link_conflicts(actual, desired),
        *vrf_conflicts(actual, desired, record),
        *(
            f"{name}: another eBPF filter sits at our priority and handle of its ingress hook"
            for name in sorted(actual.ingress.foreign & set(desired.attached.attachments))
        ),
        *(
            f"{name}: another eBPF filter sits at our priority and handle of its egress hook"
            for name in sorted(actual.steering.foreign & set(desired.steering.attachments))
        ),
    )


def _rule_conflicts(actual: Actual, desired: Plan) -> Iterator[str]:
    """A rule among ours would be jumped over by our gotos."""
    spans = sorted(_spans(rule for rule in desired.rules if not rule.device))
    for rule in actual.foreign_rules:
        for family, first, last in spans:
            if rule.family == family and first <= rule.priority <= last:
                yield (
                    f"`{rule.text}` lies inside our block of ip rules ({first}..{last}), which jumps over it:"
                    " set rules.priority elsewhere"
                )


def _spans(rules: Iterable[FibRule]) -> Iterator[tuple[int, int, int]]:
    """Family, first and last priority of what jumps lead across, and of each rule between these."""
    reached = {Family.IPV4: -1, Family.IPV6: -1}
    first = dict(reached)
    for rule in sorted(rules, key=FibRule.sort_key):
        if rule.priority > reached[rule.family]:
            if reached[rule.family] >= 0:
                yield int(rule.family), first[rule.family], reached[rule.family]
            first[rule.family] = rule.priority
        last = rule.target if rule.action is RuleAction.GOTO else rule.priority
        reached[rule.family] = max(reached[rule.family], last)
    yield from ((int(family), first[family], reached[family]) for family in Family if reached[family] >= 0)


def _overlaps(actual: Actual, desired: Plan) -> Iterator[str]:
    """A tree that moves by less than its length: its jumps would land among the rules that it replaces.

    One that only grows or shrinks keeps its end, and its jumps what they mean.
    """
    old, new = _trees(actual.rules), _trees(desired.rules)
    for family, first, last in sorted(old - new):
        for other, start, end in sorted(new - old):
            is_same = last == end and _is_current(first, last) and _is_current(start, end)
            if other == family and start <= last and first <= end and not is_same:
                yield (
                    f"rules.priority moves our IPv{family} rules onto themselves ({first}..{last} to {start}..{end}):"
                    f" move them by {max(last - first, end - start) + 1} or more, or tear down first"
                )


def _is_current(first: int, last: int) -> bool:
    """Between guard and end are 4, 16, 64, ... groups; in trees of earlier versions there never were."""
    return (last - first - 1).bit_count() == 1


def _trees(rules: Iterable[FibRule]) -> frozenset[tuple[int, int, int]]:
    """Family, first and last priority of each tree: from its guard to the nop that ends it."""
    rules = tuple(rules)
    ends = {(rule.family, rule.priority) for rule in rules if rule.action is RuleAction.NOP}
    return frozenset(
        (int(rule.family), rule.priority, rule.target)
        for rule in rules
        if rule.action is RuleAction.GOTO and rule.fwmask and (rule.family, rule.target) in ends
    )


def _mark_conflicts(actual: Actual, desired: Plan) -> Iterator[str]:
    if not any(rule.fwmask for rule in desired.rules):
        return
    mask = desired.fwmark_mask
    for rule in actual.foreign_rules:
        if rule.priority in _KERNEL_PRIORITIES or not _uses_bits(rule, mask):
            continue
        yield (
            f"`{rule.text}` uses bits of our mark mask {mask:#010x}: set marks.mask (or marks.profile) to bits"
            " that nobody uses"
        )

    seen: set[str] = set()
    for mark in actual.foreign_marks:
        if mark.chosen & mask and mark.where not in seen:
            seen.add(mark.where)
            yield (
                f"{mark.where} sets mark bits {mark.chosen & mask:#010x} of our mask {mask:#010x}:"
                " set marks.mask (or marks.profile) to bits that nobody uses"
            )


def _uses_bits(rule: ForeignRule, mask: int) -> bool:
    """Whole-mark rules (wg-quick, Istio) compare bits of everybody; they collide where their value has ours."""
    if rule.fwmask == FULL_MASK:
        return bool(rule.fwmark & mask)
    return bool(rule.fwmask & mask)


def new_tables(actual: Actual, desired: Plan) -> frozenset[int]:
    """Tables that we are about to use alone and do not use yet."""
    if actual.rules is desired.rule_set:
        return frozenset()
    return _tables(desired.rules) - _tables(actual.rules) - set(desired.external_tables)


def tables_in_force(plan: Plan) -> frozenset[int]:
    """Tables that are ours alone: those of VRFs, and those that a routing daemon fills, are not."""
    return _tables(plan.rules) - set(plan.external_tables) - {vrf.table for vrf in plan.vrfs}


def users_of_our_tables(actual: Actual, plan: Plan) -> Iterator[str]:
    """Who came to a table of the plan in force after us. Nothing of his is taken away: one sentence for each.

    Args:
        actual: with what others have in the tables of `tables_in_force`.
        plan: the one in force.
    """
    names = {ids.table: ids.name for ids in plan.ids}
    tables = tables_in_force(plan)
    for table in sorted(tables & actual.foreign_tables.keys()):
        yield (
            f"routing table {table} of network {names[table]} holds a route of somebody else"
            f" ({actual.foreign_tables[table]}), and answers that it fits leave by it: delete that route, or pin"
            " `table` to a free one"
        )
    for rule in actual.foreign_rules:
        if rule.table in tables:
            yield (
                f"`{rule.text}` looks up routing table {rule.table}, which is that of network {names[rule.table]}:"
                " delete that rule, or pin `table` to a free one"
            )


def _tables(rules: Iterable[FibRule]) -> frozenset[int]:
    return frozenset(rule.target for rule in rules if rule.action is RuleAction.LOOKUP and not rule.device)


def _table_conflicts(actual: Actual, desired: Plan) -> Iterator[str]:
    foreign_lookups = {rule.table: rule.text for rule in actual.foreign_rules}
    # Others may use the table of a VRF that is there: that is what it is for.
    vrfs = {link.vrf_table for link in actual.links.values()}
    for table in sorted(new_tables(actual, desired) - vrfs):
        if table in actual.foreign_tables:
            yield (
                f"routing table {table} holds a route of somebody else ({actual.foreign_tables[table]}):"
                " pin `table` to a free one"
            )
        elif table in foreign_lookups:
            yield f"routing table {table} is used by `{foreign_lookups[table]}`: pin `table` to a free one"


def _link_conflicts(actual: Actual, desired: Plan) -> Iterator[str]:
    made = {link.name for link in desired.links}
    for link in desired.links:
        present = actual.links.get(link.name)
        if present is None:
            if link.parent not in actual.links and link.parent not in made:
                yield f"{link.name} cannot be made: there is no device {link.parent}"
            continue
        actual_vlan = (present.kind, present.parent, present.vlan_id, present.vlan_protocol)
        if actual_vlan != ("vlan", link.parent, link.vlan_id, link.protocol):
            what = (
                f"{_vlan(present.vlan_protocol, present.vlan_id)} on {present.parent}"
                if present.kind == "vlan"
                else "no VLAN device"
            )
            yield (
                f"device {link.name} exists and is {what}, the policy wants {_vlan(link.protocol, link.vlan_id)}"
                f" on {link.parent}: set vlan.name, or use `interface:`"
            )
    for name in _devices(desired):
        present = actual.links.get(name)
        if present is None and name not in made:
            yield f"there is no device {name}: create it, or let `vlan:` make it"
        elif present is not None and not present.up and name not in made:
            yield f"device {name} is down: set it up (`ip link set {name} up`)"
        elif present is not None and present.port_of:
            yield (
                f"device {name} is a port of {present.port_of}, where the IP stack gets its packets:"
                f" name {present.port_of} instead"
            )


def _vlan(protocol: int, vlan_id: int) -> str:
    return f"VLAN {vlan_id}" if protocol == VlanProtocol.DOT1Q else f"VLAN {vlan_id} (TPID {protocol:#06x})"


def _devices(desired: Plan) -> list[str]:
    routed = {route.device for route in desired.routes if route.device}
    checked = {network.device for network in desired.ingress.networks}
    enslaved = {slave.device for slave in desired.slaves}
    steered = {network.device for network in desired.steering.networks}
    return sorted(routed | checked | steered | enslaved)
