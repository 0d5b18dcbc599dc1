# SPDX-License-Identifier: Apache-2.0
"""Which devices of the current namespace take packets by now."""

from __future__ import annotations

import struct
import sys
from typing import Final

from datapath.kernel.netlink import Netlink
from datapath.kernel.netlink_messages import attributes, text

_GETLINK, _GETADDR = 18, 22
_IFINFO: Final = struct.Struct("=BxHiI4x")
_IFADDR: Final = struct.Struct("=BxxxI")
_IFLA_IFNAME, _IFLA_OPERSTATE, _IFLA_LINKINFO, _IFLA_INFO_KIND = 3, 16, 18, 1
_IFA_FLAGS: Final = 8
_IFF_UP, _IFF_LOOPBACK, _IFF_LOWER_UP = 0x1, 0x8, 0x10000
_IF_OPER_UP: Final = 6
_IFA_F_TENTATIVE: Final = 0x40


def waiting_devices() -> list[str]:
    """Names of those whose carrier the kernel's link watch has not seen come or go, or with an address not ready yet.

    Asked of the kernel without starting a program: it is asked again and again.
    """
    with Netlink() as netlink:
        links = netlink.dump("links", _GETLINK, bytes(_IFINFO.size))
        addresses = netlink.dump("addresses", _GETADDR, bytes(_IFADDR.size))
    tentative = {index for body in addresses for index in _tentative(body)}
    return [name for body in links for name in _waiting(body, tentative)]


def _tentative(body: bytes) -> list[int]:
    _, index = _IFADDR.unpack_from(body)
    flags = dict(attributes(body, _IFADDR.size)).get(_IFA_FLAGS)
    return [index] if flags and int.from_bytes(flags, sys.byteorder) & _IFA_F_TENTATIVE else []


def _waiting(body: bytes, tentative: set[int]) -> list[str]:
    """The name of a device that is up and still changes."""
    _, _, index, flags = _IFINFO.unpack_from(body)
    if not flags & _IFF_UP:
        return []
    found = dict(attributes(body, _IFINFO.size))
    # Neither loopback nor dummy says that it is up.
    kind = dict(attributes(found.get(_IFLA_LINKINFO, b""))).get(_IFLA_INFO_KIND, b"")
    is_silent = bool(flags & _IFF_LOOPBACK) or text(kind) == "dummy"
    has_carrier, is_seen = bool(flags & _IFF_LOWER_UP), found[_IFLA_OPERSTATE][0] == _IF_OPER_UP
    still = (has_carrier != is_seen and not is_silent) or (has_carrier and index in tentative)
    return [text(found[_IFLA_IFNAME])] if still else []
