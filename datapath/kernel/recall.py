# SPDX-License-Identifier: Apache-2.0
"""What dumps were decoded to the last time: the same bytes mean the same.

A look that finds nothing to do reads the same four megabytes as the one before. To find out what they mean takes ten
times as long as to read and to digest them. All of them are read every time: a digest stands for bytes that are there
now, never for the kernel.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Generic, TypeVar

from datapath.kernel.netlink_messages import Dump

_Item = TypeVar("_Item")
_Meaning = TypeVar("_Meaning")


def digest_of(dumps: Iterable[Dump]) -> bytes:
    """Of all of them; empty where one of them changed while it was read."""
    digests = [dump.digest for dump in dumps]
    return b"".join(digests) if all(digests) else b""


class Recall(Generic[_Meaning]):
    """The last meaning of one kind of dump."""

    def __init__(self) -> None:
        self._known: tuple[bytes, object, _Meaning] | None = None

    def of(self, digest: bytes, given: object = None) -> _Meaning | None:
        """What these bytes mean, if that is known; `given` is what else it depends on."""
        if self._known is None or not digest or self._known[:2] != (digest, given):
            return None
        return self._known[2]

    def keep(self, digest: bytes, meaning: _Meaning, given: object = None) -> None:
        self._known = (digest, given, meaning)


class SetRecall(Generic[_Item]):
    """The same for a large set, for as long as somebody else keeps that: it takes no memory."""

    def __init__(self) -> None:
        self._known: tuple[bytes, object, weakref.ref[frozenset[_Item]]] | None = None

    def of(self, digest: bytes, given: object = None) -> frozenset[_Item] | None:
        """As `Recall.of`."""
        if self._known is None or not digest or self._known[:2] != (digest, given):
            return None
        return self._known[2]()

    def keep(self, digest: bytes, found: frozenset[_Item], given: object = None) -> None:
        self._known = (digest, given, weakref.ref(found))

    def shared(self, found: frozenset[_Item], desired: frozenset[_Item]) -> frozenset[_Item]:
        """What was found, with the plan's own items as far as it has them; the plan's own set where that is equal.

        Items are compared once here, in Python and thousands of times; whoever compares these sets later has the same
        objects on both sides.
        """
        if found is desired:
            return found
        missing = desired - found
        known = desired - missing if missing else desired
        shared = known if len(known) == len(found) else known | (found - known)
        if self._known is not None and self._known[2]() is found:
            self._known = (*self._known[:2], weakref.ref(shared))
        return shared
