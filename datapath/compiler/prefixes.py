# SPDX-License-Identifier: Apache-2.0
"""Longest-prefix lists as disjoint ranges: what an nft interval set needs and an LPM trie does by itself."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from datapath.plan.ingress import IpNetwork, SourceAction, SourceRule
from datapath.plan.rtnl import Family

_BITS = {Family.IPV4: 32, Family.IPV6: 128}
_ADDRESS = {Family.IPV4: IPv4Address, Family.IPV6: IPv6Address}


@dataclass(frozen=True, slots=True)
class AddressRange:
    """All addresses from `first` to `last`, as numbers of one family."""

    family: Family
    first: int
    last: int

    def render(self) -> str:
        """As nft takes and lists it: a prefix wherever the range is one."""
        address = _ADDRESS[self.family]
        first, size = address(self.first), self.last - self.first + 1
        if size == 1:
            return str(first)
        if size & (size - 1) == 0 and self.first % size == 0:
            return f"{first}/{_BITS[self.family] - size.bit_length() + 1}"
        return f"{first}-{address(self.last)}"


class CommonSources:
    """The list that all networks share, to be asked for what lies inside a prefix.

    It has each network's VIPs: to look through it for each network would take the square of their number.

    Attributes:
        families: of which it has rules.
    """

    def __init__(self, rules: Sequence[SourceRule]) -> None:
        self.families = frozenset(Family(rule.prefix.version) for rule in rules)
        self._rules = rules
        self._places = sorted(
            (rule.prefix.version, int(rule.prefix.network_address), place) for place, rule in enumerate(rules)
        )

    def inside(self, prefixes: Iterable[IpNetwork]) -> list[SourceRule]:
        """Rules of prefixes that lie inside any of these, in the order of the list."""
        found: set[int] = set()
        for wide in prefixes:
            first, last = int(wide.network_address), int(wide.broadcast_address)
            begin = bisect.bisect_left(self._places, (wide.version, first, 0))
            end = bisect.bisect_right(self._places, (wide.version, last, len(self._rules)))
            found |= {
                place
                for _, _, place in self._places[begin:end]
                if self._rules[place].prefix.prefixlen >= wide.prefixlen
            }
        return [self._rules[place] for place in sorted(found)]


def flatten(
    own: Iterable[SourceRule], common: CommonSources, family: Family
) -> tuple[tuple[AddressRange, ...], tuple[AddressRange, ...]]:
    """Ranges that the own list decides: those it denies and those it allows.

    The longest match of both lists decides, the own list where both are equally long. Outside of the returned
    ranges only the common list matters.

    Returns:
        denied and allowed ranges; disjoint, sorted, as few as possible.
    """
    mine = [rule for rule in own if rule.prefix.version == family]
    inside = common.inside(rule.prefix for rule in mine)
    # Longer prefixes later; the own list after the common one, so that it wins a tie.
    ordered = sorted(inside, key=_length) + mine
    pieces = list(_pieces(sorted(ordered, key=_length), family))
    denied = tuple(_merge(piece for piece, action in pieces if action is SourceAction.DENY))
    allowed = tuple(_merge(piece for piece, action in pieces if action is SourceAction.ALLOW))
    return denied, allowed


def ranges_of(prefixes: Iterable[IpNetwork], family: Family) -> tuple[AddressRange, ...]:
    """The union of prefixes as disjoint ranges."""
    mine = sorted(
        (_range(prefix) for prefix in prefixes if prefix.version == family), key=lambda item: item.first
    )
    return tuple(_merge(mine))


def _length(rule: SourceRule) -> int:
    return rule.prefix.prefixlen


def _range(prefix: IpNetwork) -> AddressRange:
    return AddressRange(Family(prefix.version), int(prefix.network_address), int(prefix.broadcast_address))


def _pieces(ordered: list[SourceRule], family: Family) -> Iterator[tuple[AddressRange, SourceAction]]:
    """Cut the space at every border of a prefix; each piece belongs to the last rule of the order that holds it."""
    spans = [(_range(rule.prefix), rule.action) for rule in ordered]
    borders = sorted({span.first for span, _ in spans} | {span.last + 1 for span, _ in spans})
    for first, end in itertools.pairwise(borders):
        actions = [action for span, action in spans if span.first <= first and end - 1 <= span.last]
        if actions:
            yield AddressRange(family, first, end - 1), actions[-1]


def _merge(ranges: Iterable[AddressRange]) -> Iterator[AddressRange]:
    """Join neighbours and overlaps; the input is sorted by its first address."""
    current: AddressRange | None = None
    for item in ranges:
        if current is not None and item.first <= current.last + 1:
            current = AddressRange(current.family, current.first, max(current.last, item.last))
            continue
        if current is not None:
            yield current
        current = item
    if current is not None:
        yield current
