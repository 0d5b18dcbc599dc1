# SPDX-License-Identifier: Apache-2.0
"""The devices that main's default routes leave by.

The kernel lists a table as a whole or not at all, so a router's full table is read here; that is why only
policies that steer at these devices ask.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final

from datapath.kernel.fib_codec import AF, FIB_HEADER
from datapath.kernel.netlink import Netlink
from datapath.kernel.netlink_messages import attributes
from datapath.kernel.rtnl_dump import dump_routes
from datapath.plan.rtnl import TABLE_MAIN

# linux/rtnetlink.h
_RTN_UNICAST: Final = 1
_RTA_OIF, _RTA_MULTIPATH = 4, 9
#: struct rtnexthop: length, flags, hops, ifindex.
_NEXT_HOP: Final = struct.Struct("=HBBi")


def default_devices() -> dict[int, tuple[str, ...]]:
    """Names by family (4, 6), sorted; those of routes with any metric: the next best takes over by itself.

    Raises:
        KernelError: netlink failed.
    """
    names = dict(socket.if_nameindex())
    with Netlink() as netlink:
        return {
            int(family): tuple(
                sorted({names[index] for index in _indexes(netlink, number) if index in names})
            )
            for family, number in AF.items()
        }


def _indexes(netlink: Netlink, family: int) -> Iterator[int]:
    for body in dump_routes(netlink, family, table=TABLE_MAIN):
        # Length of the destination first: a full table has a million routes that are none of this.
        if body[1] == 0 and FIB_HEADER.unpack_from(body)[7] == _RTN_UNICAST:
            for kind, value in attributes(body, FIB_HEADER.size):
                if kind == _RTA_OIF:
                    yield int(struct.unpack("=I", value)[0])
                elif kind == _RTA_MULTIPATH:
                    yield from _next_hops(value)


def _next_hops(value: bytes) -> Iterator[int]:
    offset = 0
    while offset + _NEXT_HOP.size <= len(value):
        length, _, _, index = _NEXT_HOP.unpack_from(value, offset)
        if length < _NEXT_HOP.size:
            return
        yield index
        offset += (length + 3) & ~3
