# SPDX-License-Identifier: Apache-2.0
"""What is taken over from the plan before: of thousands of networks one change touches a handful.

Nothing here decides anything: with and without it, and whatever was compiled before, the plan is the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import chain, pairwise
from operator import eq
from typing import Any, Generic, TypeVar

from datapath.plan.ingress import IngressNetwork, SourceRule, prefix_order
from datapath.plan.rtnl import Route, Sysctl

Item = TypeVar("Item")
Source = TypeVar("Source")

#: Of so many items at most one may change for single places to be looked for; else all are sorted.
_ONE_OF = 16


class Parts(Generic[Item]):
    """What each source (a network, a device) contributes, by its name; of an unchanged one it is the same object."""

    def __init__(self) -> None:
        self._parts: Mapping[str, tuple[Item, ...]] = {}
        self._scope: object = None
        self._is_of_last = False

    def begin(self) -> None:
        """Another plan follows. What the last one had no use for is of one before that, and nothing to compare with."""
        if not self._is_of_last:
            self._parts = {}
        self._is_of_last = False

    def emit(
        self,
        sources: Iterable[tuple[str, Source]],
        unchanged: Collection[str],
        make: Callable[[Source], Iterable[Item]],
        *,
        scope: object = None,
    ) -> Mapping[str, tuple[Item, ...]]:
        """The parts of these sources, in their order.

        Args:
            sources: by name.
            unchanged: names of sources that are as they were for the plan before.
            make: one part, of its source and `scope` alone.
            scope: what all parts are made of beside their sources.
        """
        before = self._parts if scope == self._scope else {}
        parts = {}
        for name, source in sources:
            part = before.get(name) if name in unchanged else None
            parts[name] = tuple(make(source)) if part is None else part
        self._parts, self._scope, self._is_of_last = parts, scope, True
        return parts


class Merged(Generic[Item]):
    """All items of some parts in order, each once. What comes and goes is found by bisection.

    Args:
        order: key to sort by.
        is_same: of two neighbours with equal keys: the second is left out.
    """

    def __init__(self, order: Callable[[Item], Any], is_same: Callable[[Item, Item], bool] = eq) -> None:
        self._order = order
        self._is_same = is_same
        self._parts: Sequence[tuple[Item, ...]] = ()
        self._merged: tuple[Item, ...] = ()
        self._has_ties = False

    def merge(self, parts: Sequence[tuple[Item, ...]]) -> tuple[Item, ...]:
        """The items of all parts, the earlier part's first where keys are equal."""
        merged = None if self._has_ties else self._changed(parts)
        self._merged = self._anew(parts) if merged is None else merged
        self._parts = parts
        return self._merged

    def _changed(self, parts: Sequence[tuple[Item, ...]]) -> tuple[Item, ...] | None:
        """What was merged before with what changed; None where that is much, or where keys are equal."""
        old, new = {id(part): part for part in self._parts}, {id(part): part for part in parts}
        gone = {id(item) for key in old.keys() - new.keys() for item in old[key]}
        come = [item for key in new.keys() - old.keys() for item in new[key]]
        if (len(gone) + len(come)) * _ONE_OF > len(self._merged):
            return None
        if not gone and not come:
            return self._merged
        items = [item for item in self._merged if id(item) not in gone] if gone else list(self._merged)
        for item in come:
            key = self._order(item)
            place = bisect_left(items, key, key=self._order)
            if place < len(items) and self._order(items[place]) == key:
                return None
            items.insert(place, item)
        return tuple(items)

    def _anew(self, parts: Sequence[tuple[Item, ...]]) -> tuple[Item, ...]:
        items = list(chain.from_iterable(parts))
        keys = [self._order(item) for item in items]
        places = sorted(range(len(items)), key=keys.__getitem__)
        self._has_ties = any(keys[one] == keys[other] for one, other in pairwise(places))
        ordered = [items[place] for place in places]
        if not self._has_ties:
            return tuple(ordered)
        unique = ordered[:1]
        unique += [item for before, item in pairwise(ordered) if not self._is_same(before, item)]
        return tuple(unique)


class Kept:
    """What one compile leaves to the next. Holds what the plan has, and lists of it."""

    def __init__(self) -> None:
        self.routes: Parts[Route] = Parts()
        self.all_routes = Merged(Route.sort_key)
        self.sysctls: Parts[Sysctl] = Parts()
        self.all_sysctls: Merged[Sysctl] = Merged(lambda sysctl: (sysctl.key, sysctl.value))
        self.ingress: Parts[IngressNetwork] = Parts()
        self.own_addresses: Parts[SourceRule] = Parts()
        self.vips: Parts[SourceRule] = Parts()
        self.all_sources: Merged[SourceRule] = Merged(
            lambda source: prefix_order(source.prefix), lambda one, other: one.prefix == other.prefix
        )
        self.ids: Parts[tuple[str, str]] = Parts()
        self.all_ids: Merged[tuple[str, str]] = Merged(lambda element: element)

    def begin(self) -> None:
        """Before each plan."""
        for parts in (self.routes, self.sysctls, self.ingress, self.own_addresses, self.vips, self.ids):
            parts.begin()
