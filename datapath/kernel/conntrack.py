# SPDX-License-Identifier: Apache-2.0
"""Connection tracking: forget the connections of a network that is gone."""

from __future__ import annotations

from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from datapath.errors import KernelError


def forget(fwmark: int, fwmask: int) -> None:
    """Delete exactly the entries whose mark, under the mask, is `fwmark`; both families.

    The kernel filters: a delete without a tuple is a flush, and CTA_MARK with CTA_MARK_MASK narrows it.

    Raises:
        KernelError: the kernel refused.
    """
    if not fwmark or not fwmask:
        raise ValueError("a zero mark would forget the connections of everybody else")
    try:
        with NFCTSocket() as socket:
            socket.flush(mark=fwmark, mark_mask=fwmask)
    except NetlinkError as error:
        raise KernelError("delete conntrack entries", str(error), errno=error.code) from error
