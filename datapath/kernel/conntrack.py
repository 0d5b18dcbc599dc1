# SPDX-License-Identifier: Apache-2.0
"""Connection tracking: forget the connections of a network that is gone, carry over those of one that moved."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, NLMSG_ERROR
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import IPCTNL_MSG_CT_NEW, NFCTSocket, nfct_msg

from datapath.errors import KernelError
from datapath.plan.model import MarkChange


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

    Returns:
        how many entries were changed.

    Raises:
        KernelError: the kernel refused. Entries that ended meanwhile are no error.
    """
    return sum(_translate_family(change, family) for family in (socket.AF_INET, socket.AF_INET6))


def _translate_family(change: MarkChange, family: int) -> int:
    changed = 0
    with _refusals("change marks of conntrack entries"), NFCTSocket(nfgen_family=family) as channel:
        for entry in list(channel.dump(mark=change.old, mark_mask=change.old_mask)):
            message = nfct_msg()
            message["nfgen_family"] = family
            message["attrs"] = [
                *((name, _plain(value)) for name, value in entry["attrs"] if name in _IDENTITY),
                ("CTA_MARK", change.new),
                ("CTA_MARK_MASK", change.old_mask | change.new_mask),
            ]
            try:
                for _ in channel.request(
                    message, IPCTNL_MSG_CT_NEW, msg_flags=NLM_F_REQUEST | NLM_F_ACK, terminate=_is_answer
                ):
                    pass
            except NetlinkError as error:
                if error.code != errno.ENOENT:
                    raise
            else:
                changed += 1
    return changed


#: What names an entry; the reply direction follows from it.
_IDENTITY = frozenset({"CTA_TUPLE_ORIG", "CTA_ZONE"})


def _is_answer(message: Any) -> bool:
    return bool(message["header"]["type"] == NLMSG_ERROR)


def _plain(value: Any) -> Any:
    """A parsed attribute as one that can be sent again."""
    if isinstance(value, dict) and "attrs" in value:
        return {"attrs": [(name, _plain(inner)) for name, inner in value["attrs"]]}
    return value


@contextmanager
def _refusals(operation: str) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        raise KernelError(operation, str(error), errno=error.code) from error
