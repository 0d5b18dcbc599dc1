# SPDX-License-Identifier: Apache-2.0
"""Seeded packets that the kernel itself lets as far as the hooks where sources are checked.

What it drops before, whoever sends it, says nothing about a policy and is left out: broken headers, IPv6 from or to
loopback, from multicast, to the interface itself. The packets of `tests/bpf` have all that.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from typing import Final

from datapath.observe.packet import IpAddress
from datapath.plan.ingress import IngressProgram, IpNetwork
from tests.bpf import packets
from tests.bpf.generator import ADDRESSES, borders
from tests.netns.differential.ground import Number

_OPTIONS: Final = (b"\x01" * 4, b"\x94\x04\x00\x00", b"\x01" * 40)
_PORTS: Final = ((40000, 53), (68, 67), (67, 68), (547, 546), (546, 547), (67, 67), (68, 68))
_ICMPV6: Final = (0, 1, 128, 129, 130, 131, 132, 133, 135, 137, 138, 142, 143, 144)
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION = 0, 43, 44, 60


@dataclass(frozen=True, slots=True)
class Sent:
    """One packet.

    Attributes:
        frames: several where it is sent in fragments.
    """

    number: Number
    device: str
    frames: tuple[bytes, ...]


def arrives(source: IpAddress, destination: IpAddress) -> bool:
    """Whether the kernel lets a packet of these addresses into its IPv6 stack (`ip6_rcv_core`)."""
    if not isinstance(source, IPv6Address) or not isinstance(destination, IPv6Address):
        return True
    if source.is_multicast or source.is_loopback or destination.is_loopback:
        return False
    # Scopes 0 (reserved) and 1 (the interface itself) never come from a wire.
    return not (destination.is_multicast and int(destination) >> 112 & 0x0F in {0, 1})


def _near(prefixes: Iterable[IpNetwork], version: int) -> list[IpAddress]:
    return [address for prefix in prefixes if prefix.version == version for address in borders(prefix)]


class Traffic:
    """Numbered packets for one policy; every other address is next to one of its prefixes."""

    def __init__(self, rng: random.Random, program: IngressProgram, devices: Sequence[str]) -> None:
        self._rng = rng
        self._devices = devices
        of_policy = [
            prefix
            for network in program.networks
            for prefix in (*network.vips, *network.feasible, *(rule.prefix for rule in network.sources))
        ]
        of_policy += [rule.prefix for rule in program.common_sources]
        self._near = {version: _near(of_policy, version) for version in (4, 6)}
        self._vips = {
            (network.device, version): _near(network.vips, version)
            for network in program.networks
            for version in (4, 6)
        }

    def take(self, count: int, first_number: int) -> Iterator[Sent]:
        """So many packets, numbered from there on."""
        for value in range(first_number, first_number + count):
            version, device = self._rng.choice([4, 6]), self._rng.choice(self._devices)
            source, destination = self._addresses(version, device)
            build = self._ipv4 if version == 4 else self._ipv6
            ethertype = packets.ETH_P_IP if version == 4 else packets.ETH_P_IPV6
            frames = tuple(packets.frame(ethertype, part) for part in build(source, destination, value))
            yield Sent(Number(version, value), device, frames)

    def _addresses(self, version: int, device: str) -> tuple[IpAddress, IpAddress]:
        vips = self._vips.get((device, version))
        while True:
            source, destination = (self._address(version) for _ in range(2))
            if vips and self._rng.random() < 0.3:
                destination = self._rng.choice(vips)
            if arrives(source, destination):
                return source, destination

    def _address(self, version: int) -> IpAddress:
        near = self._near[version]
        return self._rng.choice(near if near and self._rng.random() < 0.5 else ADDRESSES[version])

    def _upper(self) -> tuple[int, bytes]:
        """Protocol number and upper-layer bytes, also too short ones."""
        rng, kind = self._rng, self._rng.randrange(7)
        if kind <= 2:
            sport, dport = rng.choice(_PORTS)
            return 17, packets.udp(sport=sport, dport=dport)
        if kind == 3:
            return rng.choice([6, 132, 136, 33]), struct.pack("!HH", 67, 68) + bytes(rng.choice([0, 16]))
        if kind == 4:
            return 58, bytes([rng.choice(_ICMPV6), 0, 0, 0]) + bytes(20)
        if kind == 5:
            return 2, b"\x11\0\0\0" + bytes(4)
        return rng.choice([1, 6, 17, 47, 50, 58, 89, 255]), bytes(rng.choice([0, 1, 3, 8]))

    def _large(self) -> bytes:
        """A datagram to be cut; its ports mean nothing, for only the first part has them."""
        return packets.udp(bytes(self._rng.choice([40, 64, 200])))

    def _ipv4(self, source: IpAddress, destination: IpAddress, value: int) -> Iterator[bytes]:
        rng = self._rng
        options = rng.choice(_OPTIONS) if rng.random() < 0.2 else b""
        ttl = rng.choice([1, 64, 255])
        parts: list[tuple[int, int, bytes]] = []
        if rng.random() < 0.12:
            parts = [
                (17, (0x2000 if more else 0) | offset // 8, data) for offset, more, data in cut(self._large())
            ]
        else:
            protocol, upper = self._upper()
            parts = [(protocol, rng.choice([0, 0x4000]), upper)]
        for protocol, field, body in parts:
            packet = packets.ipv4(
                str(source),
                str(destination),
                body,
                protocol=protocol,
                options=options,
                fragment=field,
                ttl=ttl,
            )
            yield numbered4(packet, value)

    def _ipv6(self, source: IpAddress, destination: IpAddress, value: int) -> Iterator[bytes]:
        rng = self._rng
        limit = rng.choice([1, 1, 64, 255, 255])
        bodies: list[tuple[int, bytes]] = []
        if rng.random() < 0.12:
            bodies = [
                (_FRAGMENT, struct.pack("!BBHI", 17, 0, offset | more, value) + data)
                for offset, more, data in cut(self._large())
            ]
        else:
            protocol, upper = self._upper()
            first, chain = self._extensions(protocol)
            bodies = [(first, chain + upper)]
        for first, body in bodies:
            packet = packets.ipv6(str(source), str(destination), body, next_header=first, hop_limit=limit)
            yield numbered6(packet, value)

    def _extensions(self, upper: int) -> tuple[int, bytes]:
        """First next-header value and a chain of well-formed headers; hop-by-hop options only in front."""
        rng = self._rng
        kinds = [rng.choice([_ROUTING, _DESTINATION]) for _ in range(rng.choice([0, 0, 0, 1, 2, 7]))]
        if rng.random() < 0.15:
            kinds.insert(0, _HOP_BY_HOP)
        chain = b""
        for following, kind in zip([*kinds, upper][1:], kinds, strict=True):
            # More than seven bytes of padding are too many for the kernel.
            units = 0 if kind == _HOP_BY_HOP else rng.choice([0, 0, 1])
            if kind == _ROUTING:
                chain += bytes([following, units]) + bytes((units + 1) * 8 - 2)
            else:
                fill = (units + 1) * 8 - 4
                chain += bytes([following, units, 1, fill]) + bytes(fill)  # PadN
        return (kinds[0] if kinds else upper), chain


def cut(data: bytes) -> Iterator[tuple[int, bool, bytes]]:
    """Offset, whether more follows, and bytes of each of two fragments."""
    middle = len(data) // 16 * 8
    yield 0, True, data[:middle]
    yield middle, False, data[middle:]


def numbered4(packet: bytes, value: int) -> bytes:
    """The packet with that identification and a right checksum."""
    size = (packet[0] & 0x0F) * 4
    header = packet[:4] + struct.pack("!H", value) + packet[6:10] + b"\0\0" + packet[12:size]
    return header[:10] + struct.pack("!H", packets.checksum(header)) + header[12:] + packet[size:]


def numbered6(packet: bytes, value: int) -> bytes:
    """The packet with that flow label."""
    return struct.pack("!I", 6 << 28 | value) + packet[4:]
