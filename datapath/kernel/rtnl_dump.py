# SPDX-License-Identifier: Apache-2.0
"""Dumps of links, addresses, rules and routes straight from rtnetlink; `fib_codec.py` reads the last two.

A generic decoder takes half a millisecond a message: with 100 networks that is a second for every look at the
kernel, and a daemon looks often.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from ipaddress import ip_interface
from typing import Final, NamedTuple

from datapath.errors import KernelError
from datapath.facts import STACKED_KINDS, LinkFacts
from datapath.kernel.netlink import Netlink
from datapath.kernel.netlink_messages import ATTRIBUTE, TYPE_MASK, Dump, attribute, attributes, text
from datapath.reconcile.actual import ActualLink

_GETLINK, _GETADDR, _GETROUTE, _GETRULE = 18, 22, 26, 34
_IFINFO: Final = struct.Struct("=BxHiI4x")
_IFADDR: Final = struct.Struct("=BBxxI")
_U32: Final = struct.Struct("=I")
_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO = 3, 4, 5, 10, 18
_IFLA_INFO_KIND, _IFLA_INFO_DATA, _IFLA_INFO_SLAVE_KIND = 1, 2, 4
_IFLA_VLAN_ID, _IFLA_VLAN_PROTOCOL = 1, 5
_IFLA_VRF_TABLE = 1
#: IFLA_AF_SPEC holds one attribute a family, and that of AF_INET the settings of the device: one word for each
#: IPV4_DEVCONF_* of linux/ip.h, from 1.
_IFLA_AF_SPEC, _IFLA_INET_CONF = 26, 1
_DEVCONF: Final = {"rp_filter": 8, "arp_announce": 18, "arp_ignore": 19, "accept_local": 23}
#: Without statistics a device is a quarter of the size.
_IFLA_EXT_MASK, _SKIP_STATS = 29, 1 << 3
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_OIF, _RTA_TABLE = 4, 15
_IFF_UP: Final = 1
#: One for each network of the largest policy, and as many of others.
_DEVICES_KEPT: Final = 8192
_SETTINGS_KEPT: Final = 64


class LinkMessage(NamedTuple):
    """One device.

    Attributes:
        attributes: those of `_LINK_WANTED` that it has, by type.
        settings: its IPv4 sysctls as one piece of memory; empty where IPv4 has nothing to do with it.
    """

    ifindex: int
    flags: int
    name: str
    attributes: Mapping[int, bytes]
    settings: bytes


_LINK_WANTED: Final = frozenset({_IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO})


def dump_links(netlink: Netlink) -> Dump:
    """All devices."""
    extended = attribute(_IFLA_EXT_MASK, _U32.pack(_SKIP_STATS))
    return netlink.raw_dump("links", _GETLINK, bytes(_IFINFO.size) + extended)


def link_message(body: bytes) -> LinkMessage:
    """Written out: a device has some forty attributes, and a node thousands of devices."""
    _, _, index, flags = _IFINFO.unpack_from(body)
    found: dict[int, bytes] = {}
    settings = b""
    offset, end, unpack = _IFINFO.size, len(body), ATTRIBUTE.unpack_from
    while offset + 4 <= end:
        length, kind = unpack(body, offset)
        if length < 4:
            break
        if kind & TYPE_MASK in _LINK_WANTED:
            found[kind & TYPE_MASK] = body[offset + 4 : offset + length]
        elif kind & TYPE_MASK == _IFLA_AF_SPEC:
            families = dict(attributes(body[offset + 4 : offset + length]))
            settings = dict(attributes(families.get(socket.AF_INET, b""))).get(_IFLA_INET_CONF, b"")
        offset += (length + 3) & ~3
    return LinkMessage(index, flags, text(found.get(_IFLA_IFNAME, b"")), found, settings)


@functools.lru_cache(maxsize=_SETTINGS_KEPT)
def ipv4_settings(settings: bytes) -> Mapping[str, str]:
    """Sysctls of a device by name, as their files say them; kept, because most devices have the same."""
    numbers = struct.unpack(f"={len(settings) // 4}i", settings[: len(settings) & ~3])
    return {name: str(numbers[place - 1]) for name, place in _DEVCONF.items() if place <= len(numbers)}


def actual_link(message: LinkMessage, names: Mapping[int, str]) -> ActualLink:
    """The device as reconciliation sees it; `names` of all devices by ifindex."""
    found = message.attributes
    info = dict(attributes(found.get(_IFLA_LINKINFO, b"")))
    kind = text(info.get(_IFLA_INFO_KIND, b""))
    vlan_id = protocol = vrf_table = 0
    parent = ""
    if kind == "vlan":
        options = dict(attributes(info.get(_IFLA_INFO_DATA, b"")))
        vlan_id = int(struct.unpack("=H", options.get(_IFLA_VLAN_ID, bytes(2)))[0])
        protocol = int.from_bytes(options.get(_IFLA_VLAN_PROTOCOL, b""), "big")
        parent = names.get(_number(found.get(_IFLA_LINK)), "")
    elif kind in STACKED_KINDS:  # for a veth IFLA_LINK is the other end
        parent = names.get(_number(found.get(_IFLA_LINK)), "")
    elif kind == "vrf":
        options = dict(attributes(info.get(_IFLA_INFO_DATA, b"")))
        vrf_table = _number(options.get(_IFLA_VRF_TABLE))
    # A VRF takes routing over, every other master the packets themselves.
    slave_kind = text(info.get(_IFLA_INFO_SLAVE_KIND, b""))
    master = names.get(_number(found.get(_IFLA_MASTER)), "")
    return ActualLink(
        message.name,
        bool(message.flags & _IFF_UP),
        kind,
        parent,
        vlan_id,
        protocol,
        port_of=master if slave_kind not in ("", "vrf") else "",
        mtu=_number(found.get(_IFLA_MTU)),
        vrf=master if slave_kind == "vrf" else "",
        vrf_table=vrf_table,
    )


def dump_addresses(netlink: Netlink) -> Dump:
    """All addresses."""
    return netlink.raw_dump("addresses", _GETADDR, bytes(_IFADDR.size))


def addresses_in(bodies: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Ifindex and address with prefix length, of every address."""
    for body in bodies:
        _, length, index = _IFADDR.unpack_from(body)
        found = dict(attributes(body, _IFADDR.size))
        # Of a point-to-point device the second is the other end's.
        address = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
        if address:
            family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
            yield index, f"{socket.inet_ntop(family, address)}/{length}"


def link_facts(links: Iterable[ActualLink], addresses: Mapping[str, list[str]]) -> tuple[LinkFacts, ...]:
    """Devices with their addresses, sorted, as the compiler may know them."""
    return tuple(
        _facts(link, tuple(addresses.get(link.name, ())))
        for link in sorted(links, key=lambda link: link.name)
    )


@functools.lru_cache(maxsize=_DEVICES_KEPT)
def _facts(link: ActualLink, addresses: tuple[str, ...]) -> LinkFacts:
    """Kept, because from one look to the next hardly any device changes, and reading addresses is dear."""
    return LinkFacts(
        name=link.name,
        kind=link.kind,
        parent=link.parent,
        vlan_id=link.vlan_id,
        vlan_protocol=link.vlan_protocol,
        up=link.up,
        mtu=link.mtu,
        vrf=link.vrf,
        vrf_table=link.vrf_table,
        addresses=tuple(sorted(map(ip_interface, addresses), key=lambda a: (a.version, int(a), str(a)))),
    )


def forget_facts() -> None:
    """Free what is kept of devices between two looks."""
    _facts.cache_clear()


def dump_rules(netlink: Netlink, family: int) -> Dump:
    """All rules of a family; the kernel has no filter for these."""
    return netlink.raw_dump("rules", _GETRULE, struct.pack("=B11x", family))


def dump_routes(
    netlink: Netlink, family: int, *, protocol: int = 0, table: int = 0, device: int = 0
) -> list[bytes]:
    """Bodies of the routes of a family, those of one protocol, table or device (by ifindex), if asked."""
    try:
        return raw_routes(netlink, family, protocol=protocol, table=table, device=device).bodies()
    except KernelError as error:
        # A table that does not exist is an empty one.
        if error.errno != errno.ENOENT:
            raise
        return []


def raw_routes(netlink: Netlink, family: int, *, protocol: int = 0, table: int = 0, device: int = 0) -> Dump:
    """The same, not taken apart yet; a table that does not exist is found out later."""
    request = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, protocol, 0, 0, 0)
    if table:
        request += attribute(_RTA_TABLE, _U32.pack(table))
    if device:
        request += attribute(_RTA_OIF, _U32.pack(device))
    return netlink.raw_dump("routes", _GETROUTE, request)


def _number(value: bytes | None) -> int:
    return int(_U32.unpack(value)[0]) if value else 0
