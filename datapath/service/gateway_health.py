# SPDX-License-Identifier: Apache-2.0
"""Up or down, by answers: quick to believe that a gateway is gone, slow to believe that it is back.

A gateway that comes and goes takes flows along each time, so it must prove itself the longer, the less it lasted.
All times are of one monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from datapath.plan.gateways import GatewayCheck

#: A gateway that was up for so many times its hold time is as good as new.
_STABLE = 10
_HOLD_GROWTH_MAX = 16


@dataclass(slots=True)
class Health:
    """One gateway.

    Attributes:
        check: what it is judged by; another one may be put in its place at any time.
        is_up: as good as up before anything is known.
        misses: questions in a row without an answer.
        answers: answers in a row.
        problem: why it cannot be asked; empty where it can.
    """

    check: GatewayCheck
    is_up: bool = True
    misses: int = 0
    answers: int = 0
    problem: str = ""
    _growth: int = 0
    _up_since_s: float | None = None
    _held_until_s: float = 0.0

    def answered(self, now_s: float) -> bool:
        """Note an answer; whether it is up again by that."""
        self.misses = 0
        self.answers += 1
        if self.is_up or self.answers < self.check.recovery or now_s < self._held_until_s:
            return False
        self.is_up, self._up_since_s = True, now_s
        return True

    def missed(self, now_s: float) -> bool:
        """Note a question without an answer; whether it is down by that."""
        self.answers = 0
        self.misses += 1
        if not self.is_up or self.misses < self.check.multiplier:
            return False
        lasted = None if self._up_since_s is None else now_s - self._up_since_s
        if lasted is None or lasted > _STABLE * self.check.hold_s:
            self._growth = 1
        else:
            self._growth = min(2 * self._growth, _HOLD_GROWTH_MAX)
        self.is_up, self._held_until_s = False, now_s + self.check.hold_s * self._growth
        return True

    def interrupted(self) -> None:
        """It cannot be asked: what was not answered just before may have had the same reason."""
        self.misses = 0

    @property
    def hold_s(self) -> float:
        """For which it stays down at least, since it went down last."""
        return self.check.hold_s * self._growth
