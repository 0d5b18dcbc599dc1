# SPDX-License-Identifier: Apache-2.0
"""Gateway probes: the kernel asks who has an address on a link (ARP, neighbour discovery), as it does for replies.

Through the kernel's own neighbour table, not by packets of our own: what is tried is what replies need, and it takes no
packet socket. An entry that is in use stays usable while it is probed; without an answer it would fail anyway.
"""

from __future__ import annotations

import socket
import struct
import time
from typing import Final, NamedTuple

from datapath.kernel.netlink import F_CREATE, F_REPLACE, Netlink, Request
from datapath.kernel.netlink_messages import attribute, attributes
from datapath.plan.probe import ProbeTask

_NEWNEIGH, _GETNEIGH = 28, 30
#: struct ndmsg of linux/neighbour.h: family, device, state, flags, type.
_NDMSG: Final = struct.Struct("=BxxxiHBB")
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
_NTF_USE: Final = 0x01
_REACHABLE, _PROBE, _NOARP, _PERMANENT = 0x02, 0x10, 0x40, 0x80
#: Valid, but the last answer may be from before the change.
_KNOWN: Final = 0x02 | 0x04 | 0x08 | 0x10
_POLL_S: Final = 0.02


class _Entry(NamedTuple):
    state: int
    link_address: bytes


_NONE: Final = _Entry(0, b"")


def ask_gateway(task: ProbeTask, deadline_s: float) -> str:
    """Have the kernel ask, and wait for the answer.

    Raises:
        OSError: the device is missing or down; TimeoutError: nobody answers.
        KernelError: the kernel refuses.
    """
    index = socket.if_nametoindex(task.device)
    family = socket.AF_INET if task.address.version == 4 else socket.AF_INET6
    with Netlink() as netlink:
        before = _entry(netlink, family, index, task.address.packed)
        if before.state & _PERMANENT:
            return ""
        if before.state & _NOARP:
            return f"{task.device} has no neighbours to ask"
        refusals = netlink.change([_question(before, family, index, task.address.packed)])
        if refusals:
            return refusals[0].reason.lower()
        while time.monotonic() < deadline_s:
            if _entry(netlink, family, index, task.address.packed).state & _REACHABLE:
                return ""
            time.sleep(_POLL_S)
    raise TimeoutError


def _question(before: _Entry, family: int, index: int, address: bytes) -> Request:
    """One that is known is probed under the address that it has; any other is looked for as if a packet waited."""
    destination = attribute(_NDA_DST, address)
    if before.state & _KNOWN and before.link_address:
        body = _NDMSG.pack(family, index, _PROBE, 0, 0)
        return Request(_NEWNEIGH, F_REPLACE, body + destination + attribute(_NDA_LLADDR, before.link_address))
    return Request(_NEWNEIGH, F_CREATE | F_REPLACE, _NDMSG.pack(family, index, 0, _NTF_USE, 0) + destination)


def _entry(netlink: Netlink, family: int, index: int, address: bytes) -> _Entry:
    on_device = attribute(_NDA_IFINDEX, struct.pack("=i", index))
    for body in netlink.dump("neighbours", _GETNEIGH, _NDMSG.pack(family, 0, 0, 0, 0) + on_device):
        found = dict(attributes(body, _NDMSG.size))
        if found.get(_NDA_DST) == address:
            return _Entry(_NDMSG.unpack_from(body)[2], found.get(_NDA_LLADDR, b""))
    return _NONE
