# SPDX-License-Identifier: Apache-2.0
"""Devices that got filters because they were many get tcx instead, one by one, while there is nothing else to do.

Each tcx attachment holds the lock of all network configuration (RTNL) for a grace period of RCU: the rests between
two of them leave most of that lock's time to others. What is to be moved is asked of the kernel at each device, so
whoever changes anything meanwhile, and a process that ends in the middle, leaves nothing to be put right.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from datapath.errors import DatapathError, KernelError
from datapath.kernel.bpf.attachments import move_to_tcx
from datapath.log import get_logger
from datapath.observe.stats import ServiceStats
from datapath.service.timers import Timers
from datapath.state import StateDirectory

#: Rests are so many times as long as what was held: a sixth of the lock's time is ours.
_RESTS: Final = 5
#: After anything else, so long; but not for ever where something happens all the time.
_PAUSE_S: Final = 1.0
_PAUSE_MAX_S: Final = 10.0
#: A device whose kernel refuses (64 programs are there, no memory) is tried again then.
_RETRY_S: Final = 600.0


class Mover:
    """At most one device at a time.

    Args:
        directory: its lock keeps an apply, and a repair, from what is half done.
        timers: of the loop that this is done in.
        stats: are told how many are left.
        moved: called with the name of each device that was moved.
    """

    def __init__(
        self, directory: StateDirectory, timers: Timers, stats: ServiceStats, moved: Callable[[str], None]
    ) -> None:
        self._directory = directory
        self._timers = timers
        self._stats = stats
        self._tell = moved
        self._log = get_logger()
        self._left: list[str] = []
        self._refused: set[str] = set()
        self._retry_at_s = 0.0
        self._began_s = 0.0
        self._count = 0

    @property
    def left(self) -> int:
        """How many are to be moved yet."""
        return len(self._left)

    def follow(self, filtered: frozenset[str]) -> None:
        """These have filters, as a look has found just now."""
        now = time.monotonic()
        if self._refused and now >= self._retry_at_s:
            self._refused.clear()
        had_any, self._left = bool(self._left), sorted(filtered - self._refused, reverse=True)
        self._stats.filtered = len(filtered)
        if self._left and not had_any:
            self._began_s, self._count = now, 0
            self._log.info("programs_moving", devices=len(self._left), to="tcx")
        self.pause()

    def pause(self) -> None:
        """There is something else to do."""
        if self._left:
            self._timers.debounce(self._run, time.monotonic(), _PAUSE_S, _PAUSE_MAX_S)
        else:
            self._timers.cancel(self._run)

    def _run(self) -> None:
        if not self._left:
            return
        began = time.monotonic()
        try:
            self.move()
        except (
            DatapathError
        ):  # another process works on the state; or it cannot be locked, as the next look will say
            self.pause()
            return
        if self._left:
            now = time.monotonic()
            self._timers.set(self._run, now + (now - began) * _RESTS)

    def move(self) -> None:
        """Move the next device. One that refuses is left out.

        Raises:
            DatapathError: the state cannot be locked at this moment.
        """
        ifname, is_moved = self._left[-1], False
        with self._directory.locked(wait_s=0):
            try:
                is_moved = move_to_tcx(ifname)
            except KernelError as error:
                self._refused.add(ifname)
                self._retry_at_s = time.monotonic() + _RETRY_S
                self._log.warning("program_not_moved", device=ifname, error=str(error), hint=error.hint)
        self._left.pop()
        if is_moved:
            self._count += 1
            self._tell(ifname)
        self._stats.filtered = len(self._left) + len(self._refused)
        if not self._left:
            seconds = round(time.monotonic() - self._began_s, 1)
            self._log.info(
                "programs_moved", devices=self._count, seconds=seconds, not_moved=len(self._refused)
            )
