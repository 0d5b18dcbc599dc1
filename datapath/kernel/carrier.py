# SPDX-License-Identifier: Apache-2.0
"""Whether a device takes packets now, or its link is down: asked in two ways, because neither tells all.

Linux notes at once that a carrier is gone or back, and does something about it (queue, `operstate`, the carrier of the
VLANs above) when its link watch runs: up to a second later if any other device of the machine changed before. Until
then a device that lost its carrier looks as if it took packets, and one whose carrier is back drops them silently.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from typing import Final

from datapath.kernel.devices import GETLINK, IFINFOMSG
from datapath.kernel.netlink import Netlink, Request
from datapath.kernel.netlink_messages import attribute, attributes

NO_CARRIER: Final = "the device has no carrier, or takes no packets now"

_SIOCGIFNAME, _SIOCGIFFLAGS = 0x8910, 0x8913
#: struct ifreq: a name, and an index or flags.
_IFREQ_INDEX, _IFREQ_FLAGS = struct.Struct("=16si20x"), struct.Struct("=16sH22x")
_IFF_UP, _IFF_RUNNING, _IFF_LOWER_UP = 0x1, 0x40, 0x10000
_IFLA_LINK, _IFLA_EXT_MASK, _IFLA_LINK_NETNSID = 5, 29, 37
_SKIP_STATS: Final = struct.pack("=I", 1 << 3)
#: A VLAN in a VLAN on a bond is three; the two ends of a veth name each other.
_STACK_MAX: Final = 8


def takes_packets(sock: socket.socket, device: int) -> bool:
    """False for a device that is up and has no carrier or no queue. Never waits: the kernel takes no lock for this.

    Args:
        sock: any, of the device's namespace.
        device: ifindex.

    Raises:
        OSError: there is no such device.
    """
    name, _ = _IFREQ_INDEX.unpack(fcntl.ioctl(sock, _SIOCGIFNAME, _IFREQ_INDEX.pack(b"", device)))
    _, flags = _IFREQ_FLAGS.unpack(fcntl.ioctl(sock, _SIOCGIFFLAGS, _IFREQ_FLAGS.pack(name, 0)))
    return not flags & _IFF_UP or bool(flags & _IFF_RUNNING)


def has_carrier(device: int) -> bool:
    """The carrier of a device and of all below it, as their drivers have it. False where one is gone.

    Args:
        device: ifindex.

    Raises:
        KernelError: the kernel could not be asked.
    """
    with Netlink() as netlink:
        for _ in range(_STACK_MAX):
            body = IFINFOMSG.pack(0, 0, device, 0, 0) + attribute(_IFLA_EXT_MASK, _SKIP_STATS)
            (answer,) = netlink.ask("device", [Request(GETLINK, 0, body)])
            if isinstance(answer, int) or not IFINFOMSG.unpack_from(answer)[3] & _IFF_LOWER_UP:
                return False
            found = dict(attributes(answer, IFINFOMSG.size))
            lower = struct.unpack("=I", found.get(_IFLA_LINK, bytes(4)))[0]
            # One in another namespace cannot be asked here.
            if lower in (0, device) or _IFLA_LINK_NETNSID in found:
                break
            device = lower
    return True
