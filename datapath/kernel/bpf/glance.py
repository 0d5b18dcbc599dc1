# SPDX-License-Identifier: Apache-2.0
"""What runs at devices, as far as no event tells of a change: their tcx programs, asked for one by one.

Nothing dumps them: a device costs a system call and the RTNL lock, together three microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from datapath.kernel import tc
from datapath.kernel.bpf import attachments, tcx
from datapath.plan.tc import Direction


@dataclass(frozen=True, slots=True)
class Glance:
    """At one moment.

    Attributes:
        programs: ids by ifindex, in the order in which they run.
    """

    direction: Direction
    programs: Mapping[int, tuple[int, ...]]

    def holds(self) -> bool:
        """Whether the same runs there now. A device that is another by now went with an event.

        Raises:
            KernelError: the kernel cannot be asked.
        """
        now = tcx.chains(self.programs, self.direction)
        return all(found == seen for found, seen in zip(now, self.programs.values(), strict=True))

    def moved(self, ifname: str) -> Glance:
        """We attached our program there ourselves, before all others; whatever else is new there stays news.

        Raises:
            KernelError: the kernel cannot be asked.
        """
        ifindex = tc.indexes_of([ifname])[ifname]
        seen, now = self.programs.get(ifindex), tcx.programs(ifindex, self.direction)
        if seen is None or not now or now[1:] != seen or not attachments.is_ours(now[0], self.direction):
            return self
        return Glance(self.direction, {**self.programs, ifindex: now})


def glance(ifindexes: Iterable[int], direction: Direction) -> Glance:
    """What runs at these devices now.

    Raises:
        KernelError: the kernel cannot be asked.
    """
    asked = list(ifindexes) if tcx.is_supported() else []
    # Most devices run the same.
    same: dict[tuple[int, ...], tuple[int, ...]] = {}
    chains = (same.setdefault(found, found) for found in tcx.chains(asked, direction))
    return Glance(direction, dict(zip(asked, chains, strict=True)))
