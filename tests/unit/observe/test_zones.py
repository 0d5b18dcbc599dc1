# SPDX-License-Identifier: Apache-2.0
"""What `doctor` says about zones that others use, too."""

from __future__ import annotations

import pytest

from datapath.compiler.zone_ids import ZONE_BASE, ZONE_LAST
from datapath.observe.doctor_zones import check_zones
from datapath.plan.model import NetworkIds, Plan

FIRST = ZONE_BASE + 1


@pytest.mark.parametrize(
    ("taken", "free"),
    [
        (range(FIRST, FIRST + 1), FIRST + 1),
        (range(FIRST, ZONE_LAST), ZONE_LAST),
        (range(FIRST, ZONE_LAST + 1), ZONE_BASE),
        (range(ZONE_BASE - 1, ZONE_LAST + 1), ZONE_BASE - 2),
    ],
)
def test_a_free_zone_is_named_also_where_our_range_is_used_up(taken: range, free: int) -> None:
    plan = Plan(0, ids=(NetworkIds("a", zone=FIRST),))
    (found,) = check_zones(plan, dict.fromkeys(taken, "nft table inet hog, chain c"))
    assert f"zone {FIRST} of network a is used by nft table inet hog" in found.seen
    assert f"`zone: {free}` (nobody" in found.remedy
