# SPDX-License-Identifier: Apache-2.0
"""Which address of a device a question to one of its neighbours carries."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_interface
from typing import Final

from datapath.kernel.netlink import Netlink
from datapath.kernel.netlink_messages import attributes

_GETADDR: Final = 22
#: struct ifaddrmsg: family, prefix length, flags, scope, device.
_IFADDRMSG: Final = struct.Struct("=BBBBI")
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
#: IFA_F_TENTATIVE and IFA_F_DADFAILED: nobody may use it (yet).
_UNUSABLE: Final = 0x40 | 0x08

Interface = IPv4Interface | IPv6Interface
Address = IPv4Address | IPv6Address


def usable_addresses(device: int, family: int) -> list[Interface]:
    """Addresses of a device that packets may carry.

    Args:
        device: ifindex.
        family: 4 or 6.

    Raises:
        KernelError: there is no such device.
    """
    number = socket.AF_INET if family == 4 else socket.AF_INET6
    with Netlink() as netlink:
        bodies = netlink.dump("addresses", _GETADDR, _IFADDRMSG.pack(number, 0, 0, 0, device))
    return list(_parse(bodies))


def _parse(bodies: Iterable[bytes]) -> Iterator[Interface]:
    for body in bodies:
        _, length, flags, _, _ = _IFADDRMSG.unpack_from(body)
        found = dict(attributes(body, _IFADDRMSG.size))
        if _IFA_FLAGS in found:
            flags = struct.unpack("=I", found[_IFA_FLAGS])[0]
        address = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
        if address and not flags & _UNUSABLE:
            yield ip_interface(f"{ip_address(address)}/{length}")


def source_for(target: Address, own: Iterable[Interface]) -> Address | None:
    """The one on the target's subnet; a link-local one serves every IPv6 neighbour. None: there is none."""
    fallback: Address | None = None
    for interface in own:
        if interface.version != target.version:
            continue
        if target in interface.network:
            return interface.ip
        if interface.version == 6 and interface.ip.is_link_local:
            fallback = interface.ip
    return fallback
