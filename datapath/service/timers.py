# SPDX-License-Identifier: Apache-2.0
"""One-shot timers by action, on the monotonic clock."""

from __future__ import annotations

from collections.abc import Callable

Action = Callable[[], None]
#: However dear something is, it is repeated after so many of its periods.
_RARER_MAX = 10


def interval_s(period_s: float, took_s: float, share: float) -> float:
    """When to do something again: after a period, but so rarely that it takes no more than a share of a processor."""
    return min(max(period_s, took_s / share), _RARER_MAX * period_s)


class Timers:
    """At most one time per action."""

    def __init__(self) -> None:
        self._due: dict[Action, float] = {}
        self._began: dict[Action, float] = {}

    def set(self, action: Action, at_s: float) -> None:
        """Run the action then, whatever was said before."""
        self._due[action] = at_s
        self._began.pop(action, None)

    def earliest(self, action: Action, at_s: float) -> None:
        """Run it then, unless it is to run sooner anyway."""
        self._due[action] = min(at_s, self._due.get(action, at_s))

    def debounce(self, action: Action, now_s: float, quiet_s: float, burst_s: float) -> None:
        """Run it once nobody has called this for `quiet_s`, but at most `burst_s` after the first call."""
        began = self._began.setdefault(action, now_s)
        due = min(now_s + quiet_s, began + burst_s)
        # A timer that was set for other reasons stays where it is if it comes sooner and is not of this burst.
        self._due[action] = due

    def cancel(self, action: Action) -> None:
        self._due.pop(action, None)
        self._began.pop(action, None)

    def wait_s(self, now_s: float) -> float | None:
        """How long nothing is due; None where nothing ever is."""
        return max(0.0, min(self._due.values()) - now_s) if self._due else None

    def due(self, now_s: float) -> list[Action]:
        """Actions whose time has come, the earliest first; each is returned once."""
        ready = sorted(
            (at, number, action) for number, (action, at) in enumerate(self._due.items()) if at <= now_s
        )
        for _, _, action in ready:
            self.cancel(action)
        return [action for _, _, action in ready]
