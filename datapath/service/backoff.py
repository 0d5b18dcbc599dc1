# SPDX-License-Identifier: Apache-2.0
"""How long to leave something alone that somebody undoes again and again."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

#: Repairs of one thing that are nobody's fight yet: an operator's script may well flush twice.
FREE_REPAIRS = 4
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
#: Quiet time after which everything is forgotten.
FORGET_S = 60.0


@dataclass(slots=True)
class _Contest:
    repairs: int
    last_s: float
    until_s: float = 0.0

    @property
    def delay_s(self) -> float:
        """Nothing for the first repairs, then twice as long each time."""
        excess = self.repairs - FREE_REPAIRS
        return min(FIRST_DELAY_S * 2 ** min(excess - 1, 16), LONGEST_DELAY_S) if excess > 0 else 0.0


class Backoff:
    """Counts repairs of each thing, and delays those that come back. All times are of one monotonic clock."""

    def __init__(self) -> None:
        self._contests: dict[Hashable, _Contest] = {}

    def repaired(self, key: Hashable, now_s: float) -> float:
        """Note a repair (or an attempt); the next one of this thing must wait for the seconds returned."""
        contest = self._contests.setdefault(key, _Contest(0, now_s))
        contest.repairs += 1
        contest.last_s = now_s
        contest.until_s = now_s + contest.delay_s
        return contest.delay_s

    def holds(self, key: Hashable, now_s: float) -> bool:
        """Whether this thing must be left alone now."""
        contest = self._contests.get(key)
        return contest is not None and now_s < contest.until_s

    def next_s(self, now_s: float) -> float | None:
        """When the first delay ends; None where nothing is delayed."""
        return min((c.until_s for c in self._contests.values() if c.until_s > now_s), default=None)

    def contested(self) -> frozenset[Hashable]:
        """Things that are delayed, or were lately."""
        return frozenset(key for key, contest in self._contests.items() if contest.delay_s)

    def forget_quiet(self, now_s: float) -> frozenset[Hashable]:
        """Drop what has been quiet for long enough; returns what was contested among it."""
        quiet = {
            key: contest
            for key, contest in self._contests.items()
            if now_s - contest.last_s > FORGET_S + contest.delay_s
        }
        for key in quiet:
            del self._contests[key]
        return frozenset(key for key, contest in quiet.items() if contest.delay_s)
