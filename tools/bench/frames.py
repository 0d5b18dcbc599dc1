# SPDX-License-Identifier: Apache-2.0
"""What is sent: traffic profiles, and how the generator writes their frames."""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from tools.bench import plan
from tools.lab.topology import IpAddress, Network, Pair

#: As in traffic.bpf.c: the end of each of our frames.
_MAGIC: Final = struct.pack("=I", 0x64706E21)
_HEAD_BYTES: Final = 64
_CONFIG: Final = struct.Struct("=64s8I")

#: Frames: 60 bytes (the shortest on a wire) of IPv4, and IPv6 with room for the mark at the end.
_PAYLOAD: Final = {4: 18, 6: 8}

SERVICE_PORT: Final = 80
BACKEND_PORT: Final = 8080
_FIRST_PORT: Final = 1024
_ICMP: Final = {4: (1, 8), 6: (58, 128)}
_UDP: Final = 17

FEW_FLOWS: Final = 256
#: As many different ports as fit above the first one.
MANY_FLOWS: Final = 32768


class Place(enum.IntEnum):
    """Where frames are counted; the order is that of `enum place` in traffic.bpf.c."""

    CLIENT = 0
    POD = 1
    DEFAULT = 2
    NODE = 3


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of traffic.

    Attributes:
        letter: short name, as in tables.
        title: for readers.
        enters: the device's role: ``vlan`` (the measured network's) or ``default``.
        arrives: where the last count must be.
        sources: the first of 16 source addresses.
        is_reflected: the pod answers; the figure is a round trip.
        is_spoofed: a policy must drop it.
        is_echo: ICMP echo, answered by the node itself.
        flows: different connections until they repeat.
        with_dnat: needs the DNAT rules in place.
    """

    letter: str
    title: str
    sources: Pair
    arrives: Place
    enters: str = "vlan"
    is_reflected: bool = False
    is_spoofed: bool = False
    is_echo: bool = False
    flows: int = FEW_FLOWS
    with_dnat: bool = False
    vip_offset: int | None = plan.POD_VIPS

    def destination(self, network: Network, family: int) -> IpAddress:
        """The first of 8 destination addresses."""
        if self.vip_offset is None:
            return plan.OTHER_PODS.get(family)
        return plan.vip(network, self.vip_offset).get(family)


PROFILES: Final = {
    profile.letter: profile
    for profile in (
        Profile("o", "one way to a VIP", plan.CLIENTS, Place.POD),
        Profile("r", "round trip", plan.CLIENTS, Place.CLIENT, is_reflected=True),
        Profile("n", "new flow per packet, one way", plan.CLIENTS, Place.POD, flows=MANY_FLOWS),
        Profile("s", "spoofed source", plan.OTHER_PODS, Place.POD, is_spoofed=True, vip_offset=None),
        Profile("x", "to no VIP, one way", plan.ROUTED, Place.POD, vip_offset=None),
        Profile(
            "u",
            "not ours, round trip",
            plan.FOREIGN,
            Place.DEFAULT,
            enters="default",
            is_reflected=True,
            vip_offset=None,
        ),
        Profile(
            "h", "VIP on the node (echo)", plan.CLIENTS, Place.CLIENT, is_echo=True, vip_offset=plan.NODE_VIPS
        ),
        Profile(
            "d",
            "round trip with DNAT",
            plan.CLIENTS,
            Place.CLIENT,
            is_reflected=True,
            with_dnat=True,
            vip_offset=plan.DNAT_VIPS,
        ),
    )
}


def checksum(data: bytes) -> int:
    """The internet checksum."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def frame(profile: Profile, network: Network, family: int, ether: tuple[bytes, bytes]) -> bytes:
    """Flow 0 of a profile.

    Args:
        profile: of the traffic.
        network: the measured one.
        family: 4 or 6.
        ether: MAC addresses of the receiver and the sender.
    """
    source, destination = profile.sources.get(family) + 16, profile.destination(network, family)
    payload = bytes(_PAYLOAD[family] - len(_MAGIC)) + _MAGIC
    if profile.is_echo:
        protocol, kind = _ICMP[family]
        body = struct.pack("!BBHHH", kind, 0, 0, 0, 1) + payload
        pseudo = b"" if family == 4 else _pseudo_header(source, destination, protocol, len(body))
        body = body[:2] + struct.pack("!H", checksum(pseudo + body)) + body[4:]
    else:
        protocol = _UDP
        body = struct.pack("!HHHH", _FIRST_PORT, SERVICE_PORT, 8 + len(payload), 0) + payload
    return b"".join(ether) + _ip_header(source, destination, protocol, len(body)) + body


def _pseudo_header(source: IpAddress, destination: IpAddress, protocol: int, length: int) -> bytes:
    return source.packed + destination.packed + struct.pack("!II", length, protocol)


def _ip_header(source: IpAddress, destination: IpAddress, protocol: int, length: int) -> bytes:
    if not isinstance(source, IPv4Address):
        fixed = struct.pack("!IHBB", 6 << 28, length, protocol, 64)
        return b"\x86\xdd" + fixed + source.packed + destination.packed
    fixed = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, protocol, 0)
    header = fixed + source.packed + destination.packed
    return b"\x08\x00" + header[:10] + struct.pack("!H", checksum(header)) + header[12:]


def flow_config(profile: Profile, family: int, first: bytes) -> bytes:
    """The generator's map entry for the profile whose flow 0 looks so."""
    transport = 34 if family == 4 else 54
    return _CONFIG.pack(
        first[:_HEAD_BYTES].ljust(_HEAD_BYTES, b"\0"),
        family == 6,
        profile.flows - 1,
        15,
        plan.VIPS - 1,
        transport + (4 if profile.is_echo else 0),
        transport + 2 if profile.is_echo else 0,
        profile.is_reflected,
        0,
    )
