# SPDX-License-Identifier: Apache-2.0
"""Seeded policies and packets for the differential tests.

Addresses are drawn from the borders of the prefixes that matter: one below, first, second, last but one, last,
one above. Random addresses would nearly always miss every prefix.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_network
from typing import TYPE_CHECKING, Final

from datapath.observe.reference import Arrival
from datapath.plan.ingress import (
    IngressNetwork,
    IngressPoint,
    IngressProgram,
    OtherCheck,
    SourceAction,
    SourceRule,
    VipCheck,
    VlanProtocol,
)
from tests.bpf import packets

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from datapath.observe.packet import IpAddress
    from datapath.plan.ingress import IpNetwork
    from tests.bpf.packets import Tag

MASK: Final = 0x00FF0000

#: What policies choose from; the lab's routes use some of them.
PREFIXES: Final[tuple[IpNetwork, ...]] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/0",
        "10.96.0.0/12",
        "10.112.0.0/12",
        "10.112.3.0/24",
        "10.112.3.64/26",
        "192.0.2.0/24",
        "192.0.2.0/25",
        "192.0.2.77/32",
        "198.51.100.0/24",
        "198.51.100.128/25",
        "203.0.113.0/24",
        "203.0.113.255/32",
        "100.64.0.0/10",
        "169.254.0.0/16",
        "::/0",
        "fd00:10:96::/112",
        "fd00:10:112::/48",
        "fd00:10:112:3::/64",
        "2001:db8:1::/48",
        "2001:db8:1:1::/64",
        "2001:db8:1:1::80/121",
        "2001:db8:1:1::77/128",
        "2001:db8:2::/48",
        "2001:db8:2:8000::/49",
        "64:ff9b::/96",
        "fe80::/10",
    )
)

_SPECIAL: Final[tuple[IpNetwork, ...]] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/32",
        "0.0.0.0/8",
        "127.0.0.0/8",
        "224.0.0.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "255.255.255.255/32",
        "::/128",
        "::1/128",
        "::/96",
        "::ffff:0:0/96",
        "ff01::/16",
        "ff02::/16",
        "ff05::/16",
        "fe80::/10",
        "ff02::1:2/128",
    )
)

_OPTIONS: Final = (b"", b"\x01" * 4, b"\x94\x04\x00\x00", b"\x83\x07\x04" + bytes(5), b"\x01" * 40)


def borders(prefix: IpNetwork) -> list[IpAddress]:
    """The addresses where a comparison may be off by one."""
    kind = IPv6Address if isinstance(prefix, IPv6Network) else IPv4Address
    first, last = int(prefix.network_address), int(prefix.broadcast_address)
    highest = (1 << prefix.max_prefixlen) - 1
    near = {first - 1, first, first + 1, last - 1, last, last + 1}
    return [kind(number) for number in sorted(near) if 0 <= number <= highest]


ADDRESSES: Final[dict[int, tuple[IpAddress, ...]]] = {
    version: tuple(
        sorted(
            {
                address
                for prefix in (*PREFIXES, *_SPECIAL)
                if prefix.version == version
                for address in borders(prefix)
            },
            key=int,
        )
    )
    for version in (4, 6)
}


@dataclass(frozen=True, slots=True)
class Devices:
    """Where packets arrive, and which devices stand for networks in the routing table."""

    trunk: str
    networks: tuple[str, ...]


def _prefixes(rng: random.Random, most: int) -> tuple[IpNetwork, ...]:
    return tuple(sorted(rng.sample(PREFIXES, rng.randint(0, most)), key=str))


def _rules(rng: random.Random, most: int) -> tuple[SourceRule, ...]:
    return tuple(SourceRule(prefix, rng.choice(list(SourceAction))) for prefix in _prefixes(rng, most))


def random_program(rng: random.Random, devices: Devices) -> IngressProgram:
    """Up to five networks on one trunk: untagged, 802.1Q, 802.1ad."""
    points = [
        (VlanProtocol.UNTAGGED, 0),
        (VlanProtocol.DOT1Q, 100),
        (VlanProtocol.DOT1AD, 100),
        (VlanProtocol.DOT1Q, 4094),
        (VlanProtocol.DOT1Q, 1),
    ]
    networks = []
    for slot, (protocol, vlan_id) in enumerate(rng.sample(points, rng.randint(1, len(points))), start=1):
        is_checked = rng.random() < 0.93
        networks.append(
            IngressNetwork(
                name=f"net{slot}",
                slot=slot,
                fwmark=rng.choice([0, slot << 16, 0xFF0000]),
                point=IngressPoint(devices.trunk, protocol, vlan_id),
                device=rng.choice(devices.networks),
                vips=_prefixes(rng, 4),
                vip_check=rng.choice(list(VipCheck)) if is_checked else VipCheck.OFF,
                other_check=rng.choice(list(OtherCheck)) if is_checked else OtherCheck.OFF,
                sources=_rules(rng, 4) if rng.random() < 0.7 else (),
                feasible=_prefixes(rng, 3),
                check_martians=is_checked and rng.random() < 0.7,
                check_sources=is_checked and rng.random() < 0.7,
            )
        )
    return IngressProgram(MASK, tuple(networks), common_sources=_rules(rng, 6))


def _transport(rng: random.Random) -> tuple[int, bytes]:
    """Protocol number and upper-layer bytes, also too short ones."""
    kind = rng.randrange(8)
    if kind <= 2:
        ports = rng.choice([(40000, 53), (68, 67), (67, 68), (547, 546), (546, 547), (67, 67), (68, 68)])
        return 17, packets.udp(sport=ports[0], dport=ports[1])
    if kind == 3:
        return rng.choice([6, 132, 136, 33]), struct.pack("!HH", 67, 68) + bytes(rng.choice([0, 16]))
    if kind == 4:
        return 58, bytes(
            [rng.choice([0, 1, 128, 129, 130, 131, 132, 133, 135, 137, 138, 142, 143, 144]), 0, 0, 0]
        )
    if kind == 5:
        return 2, b"\x11\0\0\0" + bytes(4)
    if kind == 6:
        return rng.choice([17, 6, 58]), bytes(rng.randrange(5))
    return rng.choice([1, 47, 50, 59, 89, 255]), bytes(8)


def _extensions(rng: random.Random, upper: int) -> tuple[int, bytes]:
    """First next-header value and a chain of headers that ends with `upper`; now and then a broken one."""
    kinds = [rng.choice([0, 43, 44, 51, 60]) for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 3, 7, 8, 9]))]
    chain = b""
    for index, kind in enumerate(kinds):
        following = kinds[index + 1] if index + 1 < len(kinds) else upper
        if kind == 44:
            offset = rng.choice([0, 0, 1, 8, 0xFFF8])
            chain += struct.pack("!BBHI", following, rng.choice([0, 255]), offset, 7)
        else:
            units = rng.choice([0, 0, 1, 2])
            size = (units + 2) * 4 if kind == 51 else (units + 1) * 8
            claimed = units if rng.random() < 0.95 else rng.choice([units + 1, 200, 255])
            chain += bytes([following, claimed]) + bytes(size - 2)
    return (kinds[0] if kinds else upper), chain


def _ipv4(rng: random.Random, source: IpAddress, destination: IpAddress) -> bytes:
    protocol, body = _transport(rng)
    options = rng.choice(_OPTIONS) if rng.random() < 0.3 else b""
    odd = rng.random() < 0.1
    return packets.ipv4(
        str(source),
        str(destination),
        body,
        protocol=protocol,
        options=options,
        fragment=rng.choice([0, 0, 0, 0x4000, 0x2000, 0x2001, 0x1FFF, 0x00B9]),
        ttl=rng.choice([0, 1, 64, 255]),
        total_length=rng.choice([0, 19, 20, 21, 24, 60, 65535]) if odd else None,
        version=rng.choice([4, 4, 6, 0, 15]) if odd else 4,
        header_words=rng.choice([0, 4, 5, 6, 15]) if odd else None,
    )


def _ipv6(rng: random.Random, source: IpAddress, destination: IpAddress) -> bytes:
    protocol, body = _transport(rng)
    first, chain = _extensions(rng, protocol)
    odd = rng.random() < 0.1
    return packets.ipv6(
        str(source),
        str(destination),
        body,
        next_header=first,
        extensions=chain,
        hop_limit=rng.choice([0, 1, 1, 64, 255, 255]),
        payload_length=rng.choice([0, 1, 4, 7, 8, 40, 65535]) if odd else None,
        version=rng.choice([6, 6, 4, 0]) if odd else 6,
    )


def _tags(rng: random.Random, program: IngressProgram) -> tuple[Tag, ...]:
    point = rng.choice(program.networks).point
    own: tuple[Tag, ...] = ()
    if point.vlan_protocol is not VlanProtocol.UNTAGGED:
        own = ((int(point.vlan_protocol), point.vlan_id | rng.choice([0, 0xE000])),)
    kind = rng.random()
    if kind < 0.8:
        return own
    priority = ((rng.choice([0x8100, 0x88A8]), rng.choice([0, 0xE000])),) * rng.choice(
        [1, 1, 2, 7, 8, 9, 10, 30]
    )
    if kind < 0.9:
        return (*priority, *own)
    other = (rng.choice([0x8100, 0x88A8]), rng.choice([1, 2, 100, 4095]))
    return (*own, other) if kind < 0.95 else (other,)


def _addresses(rng: random.Random, version: int, program: IngressProgram) -> tuple[IpAddress, IpAddress]:
    """Source and destination; every other time next to a prefix of this very program."""
    pool: Sequence[IpAddress] = ADDRESSES[version]
    chosen = []
    for _ in range(2):
        address = rng.choice(pool)
        if rng.random() < 0.5:
            network = rng.choice(program.networks)
            prefixes = [*network.vips, *network.feasible, *(rule.prefix for rule in network.sources)]
            fitting = [prefix for prefix in prefixes if prefix.version == version]
            if fitting:
                address = rng.choice(borders(rng.choice(fitting)))
        chosen.append(address)
    return chosen[0], chosen[1]


def random_arrival(rng: random.Random, program: IngressProgram, devices: Devices) -> Arrival:
    """One frame on the trunk, mostly well-formed."""
    version = rng.choice([4, 6])
    source, destination = _addresses(rng, version, program)
    payload = _ipv4(rng, source, destination) if version == 4 else _ipv6(rng, source, destination)
    ethertype = packets.ETH_P_IP if version == 4 else packets.ETH_P_IPV6
    kind = rng.random()
    if kind < 0.03:
        ethertype = rng.choice([packets.ETH_P_ARP, 0x8847, 0x0026, packets.ETH_P_IP, packets.ETH_P_IPV6])
    elif kind < 0.10:
        payload = payload[: rng.randrange(len(payload) + 1)]
    elif kind < 0.15:
        payload += rng.choice([bytes(18), struct.pack("!HH", 67, 68) * 6, struct.pack("!HH", 547, 546) * 6])
    tags = _tags(rng, program)
    in_metadata = bool(tags) and rng.random() < 0.7
    return Arrival(
        ifname=devices.trunk,
        data=packets.frame(ethertype, payload, tags[1:] if in_metadata else tags),
        metadata_tag=tags[0] if in_metadata else None,
        mark=rng.choice([0, 0xFFFFFFFF, rng.getrandbits(32)]),
        is_merged=rng.random() < 0.1,
    )
