# SPDX-License-Identifier: Apache-2.0
"""How rarely something is repeated."""

from __future__ import annotations

import pytest

from datapath.service import loop
from datapath.service.timers import interval_s


@pytest.mark.parametrize(
    ("took_s", "interval"),
    [(0.0, 10.0), (0.001, 10.0), (0.01, 10.0), (0.02, 20.0), (0.1, 100.0), (5.0, 100.0)],
)
def test_what_takes_long_is_done_rarely_and_never_not_at_all(took_s: float, interval: float) -> None:
    assert interval_s(10.0, took_s, 0.001) == interval


def test_all_that_is_done_without_an_event_takes_two_thousandths_of_a_processor() -> None:
    assert loop.RESYNC_SHARE + loop.SYSCTL_POLL_SHARE + loop.PROGRAMS_POLL_SHARE <= 0.002
