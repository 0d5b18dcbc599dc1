# SPDX-License-Identifier: Apache-2.0
"""Packets, byte by byte."""

from __future__ import annotations

import ipaddress
import struct

ETH_P_IP = 0x0800
ETH_P_ARP = 0x0806
ETH_P_IPV6 = 0x86DD
ETH_P_8021Q = 0x8100
ETH_P_8021AD = 0x88A8

NODE_MAC = bytes.fromhex("020000000001")
PEER_MAC = bytes.fromhex("020000000002")

#: TPID and TCI (priority bits included) of one tag.
Tag = tuple[int, int]


def frame(ethertype: int, payload: bytes, tags: tuple[Tag, ...] = ()) -> bytes:
    """An Ethernet frame; `tags` from the outermost inwards."""
    header = NODE_MAC + PEER_MAC
    for tpid, tci in tags:
        header += struct.pack("!HH", tpid, tci)
    return header + struct.pack("!H", ethertype) + payload


def udp(payload: bytes = b"datapath", sport: int = 40000, dport: int = 53) -> bytes:
    """A datagram without checksum."""
    return struct.pack("!HHHH", sport, dport, 8 + len(payload), 0) + payload


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(
    source: str,
    destination: str,
    payload: bytes | None = None,
    *,
    protocol: int = 17,
    options: bytes = b"",
    fragment: int = 0,
    ttl: int = 64,
    total_length: int | None = None,
    version: int = 4,
    header_words: int | None = None,
) -> bytes:
    """An IPv4 packet; `fragment` is the 16-bit field of flags and offset."""
    body = udp() if payload is None else payload
    words = 5 + len(options) // 4 if header_words is None else header_words
    length = 20 + len(options) + len(body) if total_length is None else total_length
    header = struct.pack(
        "!BBHHHBBH4s4s",
        version << 4 | words,
        0,
        length & 0xFFFF,
        1,
        fragment,
        ttl,
        protocol,
        0,
        ipaddress.IPv4Address(source).packed,
        ipaddress.IPv4Address(destination).packed,
    )
    header += options
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + body


def ipv6(
    source: str,
    destination: str,
    payload: bytes | None = None,
    *,
    next_header: int = 17,
    extensions: bytes = b"",
    hop_limit: int = 64,
    payload_length: int | None = None,
    version: int = 6,
) -> bytes:
    """An IPv6 packet; `extensions` are complete headers, `next_header` names the first of them."""
    body = extensions + (udp() if payload is None else payload)
    length = len(body) if payload_length is None else payload_length
    return (
        struct.pack("!IHBB", version << 28, length & 0xFFFF, next_header, hop_limit)
        + ipaddress.IPv6Address(source).packed
        + ipaddress.IPv6Address(destination).packed
        + body
    )
