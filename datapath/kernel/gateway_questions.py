# SPDX-License-Identifier: Apache-2.0
"""Questions to gateways, many a second, without ever waiting: a packet goes out, and what came in is looked at later.

ARP and neighbour discovery go by packet sockets. They ask the gateway alone, under the link address of its last answer,
and everybody on the link only while there is none: then they also find a gateway that got another link address. The
kernel hears the answers, too, and keeps its own entry right by them. The sender is an address that the device has; an
IPv4 device without one asks as a host does before it takes an address (RFC 5227): nobody learns anything from that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from abc import ABC, abstractmethod
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

from datapath.errors import KernelError
from datapath.kernel.carrier import NO_CARRIER, has_carrier, takes_packets
from datapath.kernel.device_addresses import source_for, usable_addresses
from datapath.kernel.socket_filter import attach_answer_filter
from datapath.plan.gateways import CheckMethod

Address = IPv4Address | IPv6Address

_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_ARPHRD_ETHER: Final = 1
_PACKET_HOST: Final = 0
_BROADCAST: Final = b"\xff" * 6
#: Hardware and protocol type and sizes, operation; link and IP address of sender and target.
_ARP: Final = struct.Struct("!HHBBH6s4s6s4s")
_ARP_REQUEST: Final = 1
#: Version and flow label, payload length, next header, hop limit, source, destination.
_IPV6: Final = struct.Struct("!IHBB16s16s")
#: Type, code, checksum, flags; target; option: type and length, link address.
_SOLICITATION: Final = struct.Struct("!BBHI16sBB6s")
_ADVERTISEMENT: Final = struct.Struct("!BBHI16s")
_NEIGHBOUR_SOLICITATION, _NEIGHBOUR_ADVERTISEMENT, _SOURCE_LINK_ADDRESS = 135, 136, 1
#: Neighbour discovery from further away is not to be believed (RFC 4861).
_HOP_LIMIT: Final = 255
_SOLICITED: Final = 0x40000000
#: Type, code, checksum, identifier, sequence number.
_ECHO: Final = struct.Struct("!BBHHH")
_ECHO_TYPES: Final = {4: (8, 0), 6: (128, 129)}
#: SOL_RAW and ICMP_FILTER of linux/icmp.h; ICMP6_FILTER of linux/icmpv6.h.
_SOL_RAW, _ICMP_FILTER, _ICMP6_FILTER = 255, 1, 1
#: More answers than there are questions: somebody floods us, and the rest can wait for the next look.
_READS_MAX: Final = 64


class Questions(ABC):
    """Questions of one kind to the gateways of one family on one device. Close it.

    Attributes:
        device: ifindex.
    """

    def __init__(self, device: str, family: int) -> None:
        """Raises OSError: there is no such device, or it cannot be asked this way."""
        self.device = socket.if_nametoindex(device)
        self.family = family
        self._links: dict[Address, bytes] = {}
        self._socket = self._open(device)
        self._sources: dict[Address, Address | None] = {}

    @abstractmethod
    def _open(self, device: str) -> socket.socket: ...

    def ask(self, target: Address, *, everybody: bool) -> None:
        """Send one question.

        Args:
            target: the gateway.
            everybody: the last one was not answered: its link address may be another one now.

        Raises:
            OSError: it cannot be asked now.
        """
        if not takes_packets(self._socket, self.device):
            raise OSError(errno.ENOLINK, NO_CARRIER)
        try:
            self._ask(target, everybody=everybody)
        except OSError as error:
            # What a device says that has no queue yet, or a full one.
            if error.errno == errno.ENOBUFS:
                raise OSError(errno.ENOLINK, NO_CARRIER) from error
            raise

    def has_carrier(self) -> bool:
        """Whether a question could have got out. Waits for whoever configures devices."""
        try:
            return has_carrier(self.device)
        except KernelError:
            return True

    @abstractmethod
    def _ask(self, target: Address, *, everybody: bool) -> None: ...

    @abstractmethod
    def answers(self) -> set[Address]:
        """Who has answered since the last call. Never waits."""

    def is_waiting(self) -> bool:
        """Whether the last question may still be answered by somebody else than the gateway."""
        return False

    def trouble(self, target: Address) -> str:  # noqa: ARG002
        """Why the last question says nothing about the gateway, where that is known only afterwards."""
        return ""

    def link_address(self, target: Address) -> bytes:
        """Of its last answer; empty where there was none, and for those who are asked by echo requests."""
        return self._links.get(target, b"")

    def forget_sources(self) -> None:
        """The device's addresses may have changed."""
        self._sources.clear()

    def close(self) -> None:
        self._socket.close()

    def _source(self, target: Address) -> Address | None:
        if target not in self._sources:
            try:
                own = usable_addresses(self.device, self.family)
            except KernelError as error:
                raise OSError(error.errno or errno.ENODEV, str(error)) from error
            self._sources[target] = source_for(target, own)
        return self._sources[target]


class PacketQuestions(Questions):
    """Questions that a gateway answers itself, each with a packet."""

    @abstractmethod
    def _answered(self, data: bytes, sender: Any) -> Address | None:
        """Who answers with this packet."""

    def answers(self) -> set[Address]:
        found: set[Address] = set()
        for _ in range(_READS_MAX):
            try:
                data, sender = self._socket.recvfrom(2048, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:  # said once, of a device that went down
                continue
            address = self._answered(data, sender)
            if address is not None:
                found.add(address)
        return found


class ArpQuestions(PacketQuestions):
    """Who has that IPv4 address?"""

    def _open(self, device: str) -> socket.socket:
        return _packet_socket(device, _ETH_P_ARP, 4)

    def _ask(self, target: Address, *, everybody: bool) -> None:
        if everybody:
            self._links.pop(target, None)
        name, _, _, _, own = self._socket.getsockname()
        source = self._source(target)
        packet = _ARP.pack(
            _ARPHRD_ETHER,
            0x0800,
            6,
            4,
            _ARP_REQUEST,
            own,
            source.packed if source else bytes(4),
            bytes(6),
            target.packed,
        )
        self._socket.sendto(packet, (name, _ETH_P_ARP, 0, 0, self._links.get(target, _BROADCAST)))

    def _answered(self, data: bytes, sender: Any) -> Address | None:
        if len(data) < _ARP.size or sender[2] != _PACKET_HOST:
            return None
        _, _, _, _, _, link, source, _, _ = _ARP.unpack_from(data)
        address = IPv4Address(source)
        self._links[address] = link
        return address


class NeighbourQuestions(PacketQuestions):
    """Who has that IPv6 address?"""

    def _open(self, device: str) -> socket.socket:
        return _packet_socket(device, _ETH_P_IPV6, 6)

    def _ask(self, target: Address, *, everybody: bool) -> None:
        if everybody:
            self._links.pop(target, None)
        source = self._source(target)
        if source is None:
            # The next one is asked for again: the kernel makes it a moment after the device came up.
            self._sources.clear()
            raise OSError(errno.EADDRNOTAVAIL, "the device has no link-local address")
        name, _, _, _, own = self._socket.getsockname()
        link = self._links.get(target)
        # To everybody who may have that address (RFC 4291, solicited-node multicast).
        destination = (
            target.packed if link else bytes.fromhex("ff0200000000000000000001ff") + target.packed[-3:]
        )
        packet = _solicitation(source.packed, destination, target.packed, own)
        self._socket.sendto(packet, (name, _ETH_P_IPV6, 0, 0, link or b"\x33\x33" + destination[-4:]))

    def _answered(self, data: bytes, sender: Any) -> Address | None:
        if len(data) < _IPV6.size + _ADVERTISEMENT.size or sender[2] != _PACKET_HOST:
            return None
        _, _, header, hops, _, _ = _IPV6.unpack_from(data)
        kind, _, _, flags, target = _ADVERTISEMENT.unpack_from(data, _IPV6.size)
        if (header, hops, kind) != (socket.IPPROTO_ICMPV6, _HOP_LIMIT, _NEIGHBOUR_ADVERTISEMENT):
            return None
        if not flags & _SOLICITED:
            return None
        address = IPv6Address(target)
        self._links[address] = sender[4]
        return address


class EchoQuestions(PacketQuestions):
    """Echo requests; beside one that follows an unanswered one, the link is asked who has the address now."""

    def _open(self, device: str) -> socket.socket:
        self._sequence = 0
        self._neighbours = questions(device, self.family, CheckMethod.NEIGHBOUR)
        try:
            return _echo_socket(device, self.family)
        except OSError:
            self._neighbours.close()
            raise

    def _ask(self, target: Address, *, everybody: bool) -> None:
        source = self._source(target)
        if source is None:
            self._sources.clear()
            raise OSError(
                errno.EADDRNOTAVAIL, "the device has no address on the gateway's subnet to ask from"
            )
        if everybody:
            with contextlib.suppress(OSError):
                self._neighbours.ask(target, everybody=True)
        self._sequence = (self._sequence + 1) & 0xFFFF
        number = _identifier()
        packet = _ECHO.pack(_ECHO_TYPES[self.family][0], 0, 0, number, self._sequence)
        if self.family == 4:
            packet = _ECHO.pack(_ECHO_TYPES[4][0], 0, _checksum(packet), number, self._sequence)
            destination: tuple[Any, ...] = (str(target), 0)
        else:
            destination = (str(target), 0, 0, self.device)
        self._socket.sendmsg([packet], [_from(source, self.device)], 0, destination)

    def _answered(self, data: bytes, sender: Any) -> Address | None:
        offset = (data[0] & 0x0F) * 4 if self.family == 4 and data else 0
        if len(data) < offset + _ECHO.size:
            return None
        kind, _, _, number, _ = _ECHO.unpack_from(data, offset)
        if kind != _ECHO_TYPES[self.family][1] or number != _identifier():
            return None
        return ip_address(sender[0].partition("%")[0])

    def answers(self) -> set[Address]:
        self._neighbours.answers()
        return super().answers()

    def close(self) -> None:
        self._neighbours.close()
        super().close()


def questions(device: str, family: int, method: CheckMethod) -> Questions:
    """Open what asks this way.

    Raises:
        OSError: there is no such device, or it cannot be asked this way.
    """
    if method is CheckMethod.ICMP:
        return EchoQuestions(device, family)
    return ArpQuestions(device, family) if family == 4 else NeighbourQuestions(device, family)


def _packet_socket(device: str, protocol: int, family: int) -> socket.socket:
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    try:
        # Without a protocol it takes nothing in until the filter is there and it is bound.
        sock = socket.socket(socket.AF_PACKET, kind, 0)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        reason = "the service may not open packet sockets: add AF_PACKET to its RestrictAddressFamilies="
        raise OSError(error.errno, reason) from error
    try:
        attach_answer_filter(sock, family)
        sock.bind((device, protocol))
    except OSError:
        sock.close()
        raise
    _, _, _, hardware, link = sock.getsockname()
    if hardware != _ARPHRD_ETHER or len(link) != 6:
        sock.close()
        raise OSError(errno.EOPNOTSUPP, f"{device} has no neighbours to ask")
    return sock


def _solicitation(source: bytes, destination: bytes, target: bytes, link: bytes) -> bytes:
    def message(checksum: int) -> bytes:
        return _SOLICITATION.pack(
            _NEIGHBOUR_SOLICITATION, 0, checksum, 0, target, _SOURCE_LINK_ADDRESS, 1, link
        )

    pseudo = source + destination + struct.pack("!II", _SOLICITATION.size, socket.IPPROTO_ICMPV6)
    header = _IPV6.pack(6 << 28, _SOLICITATION.size, socket.IPPROTO_ICMPV6, _HOP_LIMIT, source, destination)
    return header + message(_checksum(pseudo + message(0)))


def _checksum(data: bytes) -> int:
    """Of the Internet (RFC 1071), of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def _echo_socket(device: str, family: int) -> socket.socket:
    number, protocol = (
        (socket.AF_INET, socket.IPPROTO_ICMP) if family == 4 else (socket.AF_INET6, socket.IPPROTO_ICMPV6)
    )
    sock = socket.socket(number, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode() + b"\0")
        reply = _ECHO_TYPES[family][1]
        if family == 4:
            sock.setsockopt(_SOL_RAW, _ICMP_FILTER, struct.pack("=I", ~(1 << reply) & 0xFFFFFFFF))
        else:
            blocked = [0xFFFFFFFF] * 8
            blocked[reply >> 5] &= ~(1 << (reply & 31))
            sock.setsockopt(socket.IPPROTO_ICMPV6, _ICMP6_FILTER, struct.pack("=8I", *blocked))
    except OSError:
        sock.close()
        raise
    return sock


def _identifier() -> int:
    """Tells our answers from those to somebody else's ping on the same device."""
    return os.getpid() & 0xFFFF


def _from(source: Address, device: int) -> tuple[int, int, bytes]:
    """Control message that says where a packet comes from: IP_PKTINFO, IPV6_PKTINFO."""
    if source.version == 4:
        return socket.IPPROTO_IP, 8, struct.pack("=i4s4s", device, source.packed, bytes(4))
    return socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, source.packed + struct.pack("=i", device)
