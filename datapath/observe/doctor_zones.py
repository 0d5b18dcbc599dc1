# SPDX-License-Identifier: Apache-2.0
"""Whether the zones of isolated networks are still theirs alone. Pure: from what was seen to findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from datapath.compiler.zone_ids import ZONE_BASE, ZONE_LAST
from datapath.observe.findings import Finding, ok, warn
from datapath.plan.model import Plan


def check_zones(plan: Plan, others: Mapping[int, str]) -> Iterator[Finding]:
    """Findings about zones; none where no network is isolated.

    Args:
        plan: with the zones of ours.
        others: zones that somebody else uses, with who does.
    """
    ours = {ids.zone: ids.name for ids in plan.ids if ids.zone}
    if not ours:
        return
    # Where that range is used up, next to it: those that we know of count from the other end.
    candidates = chain(range(ZONE_BASE + 1, ZONE_LAST + 1), range(ZONE_BASE, 0, -1))
    free = next((zone for zone in candidates if zone not in others and zone not in ours), None)
    for zone in sorted(ours.keys() & others.keys()):
        yield warn(
            "zones",
            f"zone {zone} of network {ours[zone]} is used by {others[zone]}, too",
            "equal connections of both are taken for one",
            f"set `zone: {free}` (nobody uses it), or give the other one another zone; open connections move",
        )
    if not ours.keys() & others.keys():
        yield ok("zones", f"{len(ours)} of connection tracking in use, nobody else uses them")
