# SPDX-License-Identifier: Apache-2.0
"""Which questions make the kernel forget the connections of many networks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from datapath.reconcile.steps import ForgetConnections


def forgotten(marks: Iterable[tuple[int, int]]) -> tuple[ForgetConnections, ...]:
    """The steps that forget exactly the connections with these marks.

    For each of them the kernel walks all connections of all namespaces: so marks that differ in one bit, and are both
    among them, are one question without that bit, and so on, as prefixes of addresses are aggregated.

    Args:
        marks: pairs of mark and mask; no mark is zero.
    """
    by_mask: dict[int, set[int]] = {}
    for mark, mask in marks:
        by_mask.setdefault(mask, set()).add(mark)
    pairs = sorted(pair for mask, values in by_mask.items() for pair in _aggregated(values, mask))
    return tuple(ForgetConnections(mark, mask) for mark, mask in pairs)


def _aggregated(values: set[int], mask: int) -> Iterator[tuple[int, int]]:
    """Zero is no member, so it is never what remains of members either."""
    for bit in (1 << position for position in range(mask.bit_length())):
        if not mask & bit:
            continue
        both = {value for value in values if not value & bit and value | bit in values}
        yield from ((value, mask) for value in values if value & ~bit not in both)
        values, mask = both, mask & ~bit
