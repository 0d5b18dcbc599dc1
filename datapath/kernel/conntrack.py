# SPDX-License-Identifier: Apache-2.0
"""Connection tracking: forget the connections of a network that is gone, carry over those of one that moved."""

from __future__ import annotations

import errno
import socket
from typing import Final

from datapath.errors import KernelError
from datapath.kernel.ctnetlink import (
    CTA_TUPLE_ORIG,
    CTA_ZONE,
    DELETE,
    NEW,
    dump_entries,
    entry_attributes,
    header,
    marked,
    nest,
    open_ctnetlink,
)
from datapath.kernel.netlink import Netlink, Request
from datapath.kernel.netlink_messages import attribute
from datapath.plan.model import MarkChange

_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


def forget(fwmark: int, fwmask: int) -> None:
    """Delete exactly the entries whose mark, under the mask, is `fwmark`; both families.

    The kernel filters: a delete without a tuple is a flush, and CTA_MARK with CTA_MARK_MASK narrows it.

    Raises:
        KernelError: the kernel refused.
    """
    if not fwmark or not fwmask:
        raise ValueError("a zero mark would forget the connections of everybody else")
    with open_ctnetlink() as channel:
        request = Request(DELETE, 0, header(socket.AF_UNSPEC) + marked(fwmark, fwmask))
        for refusal in channel.change([request]):
            raise KernelError("delete conntrack entries", refusal.reason, errno=refusal.errno)


def translate(change: MarkChange) -> int:
    """Give every entry with the old mark the new one; no bit outside both masks is written.

    A busy node has a hundred thousand of them: many travel in one message, in the kernel's own bytes.

    Returns:
        how many entries were changed.

    Raises:
        KernelError: the kernel refused. Entries that ended meanwhile are no error.
    """
    with open_ctnetlink() as channel:
        return sum(_translate_family(channel, change, family) for family in _FAMILIES)


def _translate_family(channel: Netlink, change: MarkChange, family: int) -> int:
    old = marked(change.old, change.old_mask)
    new = marked(change.new, change.old_mask | change.new_mask)
    requests = [
        Request(NEW, 0, header(family) + _identity(entry) + new)
        for entry in dump_entries(channel, family, old)
    ]
    refusals = channel.change(requests)
    for refusal in refusals:
        if refusal.errno != errno.ENOENT:
            raise refusal.error("change marks of conntrack entries")
    return len(requests) - len(refusals)


def _identity(entry: bytes) -> bytes:
    """What names an entry; the reply direction follows from it."""
    found = entry_attributes(entry)
    zone = attribute(CTA_ZONE, found[CTA_ZONE]) if CTA_ZONE in found else b""
    return nest(CTA_TUPLE_ORIG, found[CTA_TUPLE_ORIG]) + zone
