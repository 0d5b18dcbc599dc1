# SPDX-License-Identifier: Apache-2.0
"""Packets as the source checks see them, parsed in plain Python: the specification of the C parser.

What is malformed here is malformed there; sizes are bytes on the wire.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

IpAddress = IPv4Address | IPv6Address

ETH_P_IP: Final = 0x0800
ETH_P_IPV6: Final = 0x86DD
_VLAN_ETHERTYPES: Final = frozenset({0x8100, 0x88A8})
_ETHERNET_BYTES: Final = 14

#: A frame with more priority tags (VLAN id 0) in a row hides what it is.
PRIORITY_TAGS_MAX: Final = 8
#: An IPv6 packet with more extension headers is malformed.
EXTENSION_HEADERS_MAX: Final = 8

TCP: Final = 6
UDP: Final = 17
IGMP: Final = 2
ICMPV6: Final = 58
_WITH_PORTS: Final = frozenset({TCP, UDP, 33, 132, 136})  # and DCCP, SCTP, UDP-Lite

_FRAGMENT: Final = 44
_AUTHENTICATION: Final = 51
_EXTENSIONS: Final = frozenset({0, 43, _FRAGMENT, _AUTHENTICATION, 60})


class FrameProblem(enum.Enum):
    """Why a frame cannot be assigned to a network."""

    TRUNCATED = enum.auto()
    TOO_MANY_TAGS = enum.auto()


@dataclass(frozen=True, slots=True)
class Frame:
    """An Ethernet frame and the tag that counts.

    Attributes:
        vlan_protocol: TPID of that tag, 0 without one (a priority tag is none).
        ethertype: behind that tag.
        payload: what follows.
    """

    vlan_protocol: int
    vlan_id: int
    ethertype: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Packet:
    """The fields of an IP packet that a check may ask for.

    Attributes:
        protocol: of the upper layer, behind all extension headers.
        hop_limit: or TTL.
        source_port: 0 where there are no ports: other protocols, later fragments, truncated headers.
        icmp_type: of an ICMPv6 message without fragment header, otherwise 0.
    """

    source: IpAddress
    destination: IpAddress
    protocol: int
    hop_limit: int = 64
    source_port: int = 0
    destination_port: int = 0
    icmp_type: int = 0

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.source.version


def parse_frame(data: bytes, metadata_tag: tuple[int, int] | None = None) -> Frame | FrameProblem:
    """The frame's network tag and payload.

    The kernel removes priority tags in front of another tag and goes on with the next; so does this.

    Args:
        data: from the Ethernet header on.
        metadata_tag: TPID and TCI of a tag that the kernel has taken off already.
    """
    if len(data) < _ETHERNET_BYTES:
        return FrameProblem.TRUNCATED
    protocol, vlan_id = (metadata_tag[0], metadata_tag[1] & 0x0FFF) if metadata_tag else (0, 0)
    offset = _ETHERNET_BYTES
    (ethertype,) = struct.unpack_from("!H", data, 12)
    for _ in range(PRIORITY_TAGS_MAX + 1):
        if vlan_id or ethertype not in _VLAN_ETHERTYPES:
            break
        if len(data) < offset + 4:
            return FrameProblem.TRUNCATED
        tci, inner = struct.unpack_from("!HH", data, offset)
        protocol, vlan_id, ethertype = ethertype, tci & 0x0FFF, inner
        offset += 4
    if not vlan_id:
        if ethertype in _VLAN_ETHERTYPES:
            return FrameProblem.TOO_MANY_TAGS
        protocol = 0
    return Frame(vlan_protocol=protocol, vlan_id=vlan_id, ethertype=ethertype, payload=data[offset:])


def parse_ip(frame: Frame, *, is_merged: bool = False) -> Packet | None:
    """The IP packet in a frame, or None if it is malformed.

    Args:
        frame: with an IP EtherType.
        is_merged: GRO made one packet of several; an IPv4 length of 0 is right then (BIG TCP).
    """
    if frame.ethertype == ETH_P_IP:
        return _parse_ipv4(frame.payload, is_merged=is_merged)
    return _parse_ipv6(frame.payload)


def _ports(protocol: int, data: bytes) -> tuple[int, int]:
    if protocol not in _WITH_PORTS or len(data) < 4:
        return 0, 0
    source, destination = struct.unpack_from("!HH", data)
    return source, destination


def _parse_ipv4(data: bytes, *, is_merged: bool) -> Packet | None:
    if len(data) < 20:
        return None
    first, _, total, _, fragment, ttl, protocol, _, source, destination = struct.unpack_from(
        "!BBHHHBBH4s4s", data
    )
    header_bytes = (first & 0x0F) * 4
    if total == 0 and is_merged:
        total = len(data)
    if first >> 4 != 4 or header_bytes < 20 or not header_bytes <= total <= len(data):
        return None
    is_later_fragment = bool(fragment & 0x1FFF)
    ports = (0, 0) if is_later_fragment else _ports(protocol, data[header_bytes:total])
    return Packet(
        source=IPv4Address(source),
        destination=IPv4Address(destination),
        protocol=protocol,
        hop_limit=ttl,
        source_port=ports[0],
        destination_port=ports[1],
    )


@dataclass(frozen=True, slots=True)
class _UpperLayer:
    """What is behind the extension headers of an IPv6 packet."""

    protocol: int
    data: bytes
    has_fragment_header: bool
    is_later_fragment: bool


def _skip_extensions(protocol: int, data: bytes) -> _UpperLayer | None:
    has_fragment_header = False
    for _ in range(EXTENSION_HEADERS_MAX):
        if protocol not in _EXTENSIONS:
            break
        if len(data) < 8:
            return None
        length = {_FRAGMENT: 8, _AUTHENTICATION: (data[1] + 2) * 4}.get(protocol, (data[1] + 1) * 8)
        if length > len(data):
            return None
        is_fragment = protocol == _FRAGMENT
        has_fragment_header = has_fragment_header or is_fragment
        is_later = is_fragment and bool(int.from_bytes(data[2:4], "big") & 0xFFF8)
        protocol, data = data[0], data[length:]
        if is_later:
            return _UpperLayer(protocol, data, has_fragment_header, is_later_fragment=True)
    if protocol in _EXTENSIONS:
        return None
    return _UpperLayer(protocol, data, has_fragment_header, is_later_fragment=False)


def _parse_ipv6(data: bytes) -> Packet | None:
    if len(data) < 40 or data[0] >> 4 != 6:
        return None
    (length,) = struct.unpack_from("!H", data, 4)
    # 0: a jumbogram, or BIG TCP: the frame says how long it is.
    payload = data[40 : 40 + length] if length else data[40:]
    if len(payload) < length:
        return None
    upper = _skip_extensions(data[6], payload)
    if upper is None:
        return None
    ports = (0, 0) if upper.is_later_fragment else _ports(upper.protocol, upper.data)
    has_type = upper.protocol == ICMPV6 and not upper.has_fragment_header and upper.data
    return Packet(
        source=IPv6Address(data[8:24]),
        destination=IPv6Address(data[24:40]),
        protocol=upper.protocol,
        hop_limit=data[7],
        source_port=ports[0],
        destination_port=ports[1],
        icmp_type=upper.data[0] if has_type else 0,
    )
