# SPDX-License-Identifier: Apache-2.0
"""Entries of connection tracking as netlink has them: what all who list or change them have to say."""

from __future__ import annotations

import struct
from typing import Final

from datapath.kernel.netlink import NETLINK_NETFILTER, Netlink
from datapath.kernel.netlink_messages import attribute, attributes

#: linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h: NFNL_SUBSYS_CTNETLINK with IPCTNL_MSG_CT_NEW, _GET, _DELETE.
NEW, GET, DELETE = 0x100, 0x101, 0x102
CTA_TUPLE_ORIG, CTA_MARK, CTA_ZONE, CTA_MARK_MASK = 1, 8, 18, 21
#: NLA_F_NESTED of linux/netlink.h.
_NESTED: Final = 0x8000
#: Family, version, resource id.
_NFGENMSG: Final = struct.Struct("=BBH")


def open_ctnetlink() -> Netlink:
    """A socket; close it."""
    return Netlink(NETLINK_NETFILTER)


def header(family: int) -> bytes:
    """What every message begins with; AF_UNSPEC for entries of all families at once."""
    return _NFGENMSG.pack(family, 0, 0)


def dump_entries(channel: Netlink, family: int, narrowed: bytes = b"") -> list[bytes]:
    """The bodies of entries.

    Args:
        channel: from `open_ctnetlink`.
        family: as for `header`.
        narrowed: attributes that the kernel filters by.

    Raises:
        KernelError: the kernel refused.
    """
    return channel.dump("conntrack entries", GET, header(family) + narrowed)


def entry_attributes(body: bytes) -> dict[int, bytes]:
    """Type and payload of each attribute of an entry, in its order."""
    return dict(attributes(body, _NFGENMSG.size))


def marked(fwmark: int, fwmask: int) -> bytes:
    """A mark under its mask: to filter by, or to be written."""
    return attribute(CTA_MARK, fwmark.to_bytes(4, "big")) + attribute(
        CTA_MARK_MASK, fwmask.to_bytes(4, "big")
    )


def nest(kind: int, payload: bytes) -> bytes:
    """An attribute that holds others."""
    return attribute(kind | _NESTED, payload)
