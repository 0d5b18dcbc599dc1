# SPDX-License-Identifier: Apache-2.0
"""What `datapath doctor` says about VRFs that no conflict says."""

from __future__ import annotations

from collections.abc import Iterator

from datapath.compiler.vrf import HOST_SOCKETS
from datapath.observe.findings import Finding, ok, warn
from datapath.plan.model import Plan
from datapath.plan.rtnl import TABLE_LOCAL, Family
from datapath.reconcile.actual import Actual


def check_vrfs(plan: Plan, actual: Actual) -> Iterator[Finding]:
    """Findings about the VRFs of a policy; none without any."""
    if not plan.vrfs:
        return
    accepts = {setting.key for setting in plan.sysctls} & set(HOST_SOCKETS)
    hidden = [family for family in Family if _is_local_late(actual, family)]
    if hidden and accepts:
        families = " and ".join(f"IPv{family}" for family in hidden)
        back = ", ".join(f"`ip -{family} rule add pref 0 table local`" for family in hidden)
        yield warn(
            "vrf",
            f"the {families} rule for local addresses is behind the one for VRFs",
            "what enters by a VRF is looked up in its table first, and never gets to addresses of the node outside of"
            " it: backends in the host network do not answer there",
            f"move it back ({back}), or say `host_sockets: false`",
        )
    others = sorted(
        link.name
        for link in actual.links.values()
        if link.kind == "vrf" and link.name not in {vrf.name for vrf in plan.vrfs}
    )
    if others and accepts:
        yield warn(
            "vrf",
            f"sockets of the node answer in {', '.join(others)}, too",
            "`tcp_l3mdev_accept` and `udp_l3mdev_accept` count for every VRF of the node, also those of no network",
            "filter what may enter there, or say `host_sockets: false` on all networks",
        )
    if not (hidden or others) or not accepts:
        named = ", ".join(f"{slave.device} in {slave.vrf}" for slave in plan.slaves[:8])
        yield ok("vrf", f"{len(plan.vrfs)} VRF(s): {named}")


def _is_local_late(actual: Actual, family: Family) -> bool:
    """The first rule of each kind decides; the kernel's own are at 0 and 1000."""
    rules = [rule for rule in actual.foreign_rules if rule.family is family]
    local = [rule.priority for rule in rules if rule.table == TABLE_LOCAL]
    by_vrf = [rule.priority for rule in rules if rule.is_l3mdev]
    return bool(local and by_vrf) and min(local) > min(by_vrf)
