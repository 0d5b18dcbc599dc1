# SPDX-License-Identifier: Apache-2.0
"""What of others keeps a VRF from being what the policy says."""

from __future__ import annotations

from collections.abc import Iterator

from datapath.plan.model import Plan
from datapath.plan.rtnl import Slave, VrfLink
from datapath.reconcile.actual import Actual, Record
from datapath.reconcile.present import is_free_for


def vrf_conflicts(actual: Actual, desired: Plan, record: Record) -> Iterator[str]:
    """One sentence per conflict."""
    for vrf in desired.vrfs:
        yield from _link_conflicts(actual, vrf)
    for slave in desired.slaves:
        yield from _slave_conflicts(actual, slave, record)
    yield from _rule_conflicts(actual, desired)


def _link_conflicts(actual: Actual, vrf: VrfLink) -> Iterator[str]:
    present = actual.links.get(vrf.name)
    if present is None and not vrf.is_made:
        yield f"there is no VRF {vrf.name}: create it, or say `create: true`"
    elif present is not None and present.kind != "vrf":
        yield f"device {vrf.name} exists and is no VRF: give the VRF another name"
    elif present is not None and present.vrf_table != vrf.table:
        yield (
            f"VRF {vrf.name} has table {present.vrf_table}, the policy wants {vrf.table}: write {present.vrf_table}, or"
            f" delete the VRF"
        )
    elif present is not None and not present.up and not vrf.is_made:
        yield f"VRF {vrf.name} is down: set it up (`ip link set {vrf.name} up`)"
    for link in actual.links.values():
        if link.kind == "vrf" and link.vrf_table == vrf.table and link.name != vrf.name:
            yield f"routing table {vrf.table} is that of VRF {link.name}: give {vrf.name} another `table`"


def _slave_conflicts(actual: Actual, slave: Slave, record: Record) -> Iterator[str]:
    present = actual.links.get(slave.device)
    if present is None or present.vrf == slave.vrf:
        return
    if not is_free_for(slave, actual.links, record.slaves):
        yield (
            f"device {slave.device} belongs to VRF {present.vrf}, the policy wants {slave.vrf}: take it out"
            f" (`ip link set {slave.device} nomaster`), or name {present.vrf}"
        )
    elif slave.device in actual.stranded:
        yield (
            f"device {slave.device} would lose {actual.stranded[slave.device]} on its way into VRF {slave.vrf}:"
            f" move that first, or put the device there yourself (`ip link set {slave.device} master {slave.vrf}`)"
        )


def _rule_conflicts(actual: Actual, desired: Plan) -> Iterator[str]:
    """The kernel adds its rule with the first VRF of a namespace, and never again."""
    if not desired.vrfs:
        return
    for family in sorted({rule.family for rule in desired.rules if rule.device}):
        ours = max(rule.priority for rule in desired.rules if rule.device and rule.family is family)
        theirs = [rule.priority for rule in actual.foreign_rules if rule.is_l3mdev and rule.family is family]
        if not theirs and any(link.kind == "vrf" for link in actual.links.values()):
            yield (
                f"the kernel's IPv{family} rule for VRFs is missing: put it back"
                f" (`ip -{family} rule add l3mdev pref 1000`)"
            )
        elif theirs and min(theirs) <= ours:
            yield (
                f"the IPv{family} rule for VRFs is at {min(theirs)}, before ours that lead to pods ({ours}):"
                f" set rules.leak_priority below it"
            )
