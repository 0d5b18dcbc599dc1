# SPDX-License-Identifier: Apache-2.0
"""Numbers that are given out once."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Pool:
    """Numbers of one kind: which are taken, and the lowest that is not."""

    taken: set[int] = field(default_factory=set)
    _next: int = 1

    def claim(self, number: int) -> bool:
        """Take this very number; False where somebody has it."""
        if number in self.taken:
            return False
        self.taken.add(number)
        return True

    def take(self, wish: int, avoid: frozenset[int], limit: int) -> int:
        """Take the wish if it is free, else the lowest free number from 1 up.

        Args:
            wish: 0 for none.
            avoid: freed by this very change: connections may still carry them. Taken only if nothing else is left.
            limit: the largest number there is; the result may be larger, which says that none is left.
        """
        if wish and wish not in avoid and self.claim(wish):
            return wish
        while self._next in self.taken or self._next in avoid:
            self._next += 1
        number = self._next
        if number > limit:
            number = min(avoid - self.taken, default=number)
        self.taken.add(number)
        return number
