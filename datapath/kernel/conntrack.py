# SPDX-License-Identifier: Apache-2.0
"""Connection tracking: forget the connections of a network that is gone, carry over those of one that moved."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from datapath.errors import KernelError
from datapath.kernel.netlink import Netlink, Request, attribute, attributes
from datapath.plan.model import MarkChange

_NETLINK_NETFILTER: Final = 12
#: linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h: NFNL_SUBSYS_CTNETLINK with IPCTNL_MSG_CT_NEW and _GET.
_NEW, _GET = 0x100, 0x101
_CTA_TUPLE_ORIG, _CTA_MARK, _CTA_ZONE, _CTA_MARK_MASK = 1, 8, 18, 21
_NESTED: Final = 0x8000
#: Family, version, resource id.
_NFGENMSG: Final = struct.Struct("=BBH")
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)


def forget(fwmark: int, fwmask: int) -> None:
    """Delete exactly the entries whose mark, under the mask, is `fwmark`; both families.

    The kernel filters: a delete without a tuple is a flush, and CTA_MARK with CTA_MARK_MASK narrows it.

    Raises:
        KernelError: the kernel refused.
    """
    if not fwmark or not fwmask:
        raise ValueError("a zero mark would forget the connections of everybody else")
    with _refusals("delete conntrack entries"), NFCTSocket() as channel:
        channel.flush(mark=fwmark, mark_mask=fwmask)


def translate(change: MarkChange) -> int:
    """Give every entry with the old mark the new one; no bit outside both masks is written.

    A busy node has a hundred thousand of them: many travel in one message, in the kernel's own bytes.

    Returns:
        how many entries were changed.

    Raises:
        KernelError: the kernel refused. Entries that ended meanwhile are no error.
    """
    with Netlink(_NETLINK_NETFILTER) as channel:
        return sum(_translate_family(channel, change, family) for family in _FAMILIES)


def _translate_family(channel: Netlink, change: MarkChange, family: int) -> int:
    old = _mark(_CTA_MARK, change.old) + _mark(_CTA_MARK_MASK, change.old_mask)
    new = _mark(_CTA_MARK, change.new) + _mark(_CTA_MARK_MASK, change.old_mask | change.new_mask)
    header = _NFGENMSG.pack(family, 0, 0)
    requests = [
        Request(_NEW, 0, header + _identity(entry) + new)
        for entry in channel.dump("conntrack entries", _GET, header + old)
    ]
    refusals = channel.change(requests)
    for refusal in refusals:
        if refusal.errno != errno.ENOENT:
            raise KernelError("change marks of conntrack entries", refusal.reason, errno=refusal.errno)
    return len(requests) - len(refusals)


def _identity(entry: bytes) -> bytes:
    """What names an entry; the reply direction follows from it."""
    return b"".join(
        attribute(kind | _NESTED if kind == _CTA_TUPLE_ORIG else kind, payload)
        for kind, payload in attributes(entry, _NFGENMSG.size)
        if kind in (_CTA_TUPLE_ORIG, _CTA_ZONE)
    )


def _mark(kind: int, value: int) -> bytes:
    return attribute(kind, value.to_bytes(4, "big"))


@contextmanager
def _refusals(operation: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise KernelError(operation, str(error), errno=error.code) from error
