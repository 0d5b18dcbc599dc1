# SPDX-License-Identifier: Apache-2.0
"""Packets that nftables rules log to a group, read while somebody watches (nfnetlink_log).

A group has one reader. Without one, the kernel does no more for a logged packet than to look for it.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING, Final, Self

from datapath.errors import ConflictError, KernelError
from datapath.kernel.devices import device_name
from datapath.kernel.netlink import NETLINK_NETFILTER
from datapath.kernel.netlink_messages import HEADER, attribute, attributes, messages, text

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

#: linux/netfilter/nfnetlink_log.h: NFNL_SUBSYS_ULOG with NFULNL_MSG_PACKET and NFULNL_MSG_CONFIG.
_PACKET, _CONFIG = 0x400, 0x401
_F_REQUEST, _F_ACK, _ERROR = 0x1, 0x4, 2
_CFG_CMD, _CFG_MODE, _CFG_THRESHOLD, _CFG_FLAGS = 1, 2, 5, 6
_WITH_CONNTRACK: Final = struct.pack("!H", 0x4)
_BIND, _UNBIND = b"\x01", b"\x02"
_COPY_PACKET: Final = 2
#: Family, version, and the group in network order.
_NFGENMSG: Final = struct.Struct("!BBH")
_IFINDEX_IN, _IFINDEX_OUT, _PAYLOAD, _PREFIX, _CT = 4, 5, 9, 10, 18
#: linux/netfilter/nfnetlink_conntrack.h: the original direction of a connection, and its source by IP version.
_TUPLE_ORIG, _TUPLE_IP, _TUPLE_PROTO, _SOURCE_PORT = 1, 1, 2, 2
_TUPLE_SOURCE: Final = {4: 1, 6: 3}
#: IPv6 with a few extension headers, and ports behind them.
_COPIED_BYTES: Final = 128
#: More than fit into the queue: an answer and what came meanwhile.
_READS_MAX: Final = 4096
_WITH_PORTS: Final = frozenset({6, 17, 132})
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _OPTIONS = 0, 43, 44, 60
_EXTENSIONS_MAX: Final = 8


@dataclass(frozen=True, slots=True)
class LoggedPacket:
    """One packet.

    Attributes:
        prefix: what the rule says of it.
        time_ns: CLOCK_REALTIME, when it was read.
        ifname: of the device that it was about to leave by, else of the one that it came in by; empty for neither.
        source: of its connection, before anybody translated it; where the kernel does not tell, what it carries.
        translated_to: the source that it carries; None where that is the same.
        protocol: behind the extension headers of IPv6.
        source_port: 0 without ports.
    """

    prefix: str
    time_ns: int
    ifname: str
    source: IPv4Address | IPv6Address
    destination: IPv4Address | IPv6Address
    protocol: int
    source_port: int
    destination_port: int
    translated_to: IPv4Address | IPv6Address | None = None


class PacketLog:
    """The reader of one group in this network namespace; a context manager.

    Attributes:
        tells_connections: the kernel tells of a packet's connection (CONFIG_NETFILTER_NETLINK_GLUE_CT).

    Args:
        group: of the rules.
        per_second: after so many, nothing is copied until the next second.

    Raises:
        ConflictError: somebody else reads it.
        KernelError: the kernel refused.
    """

    def __init__(self, group: int, *, per_second: int = 100) -> None:
        self._group, self._per_second = group, per_second
        self.tells_connections = True
        self._second, self._taken, self._is_bound, self._sequence = 0, 0, False, 0
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_NETFILTER)
        try:
            self._socket.bind((0, 0))
            self._bind()
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is copied any more."""
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    def poll(self) -> list[LoggedPacket]:
        """What has come since the last call. Never waits; to be called every second also where nothing comes."""
        found = [packet for data in self._datagrams() for packet in _packets(data)]
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._taken = second, 0
        shown = found[: max(0, self._per_second - self._taken)]
        self._taken += len(shown)
        if self._taken >= self._per_second:
            self._unbind()
        elif not self._is_bound:
            self._bind()
        return shown

    def _datagrams(self) -> Iterator[bytes]:
        for _ in range(_READS_MAX):
            try:
                yield self._socket.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                # Said once where the queue was full: what is in it can still be read.
                if error.errno != errno.ENOBUFS:
                    raise KernelError("read logged packets", str(error), errno=error.errno or 0) from error

    def _bind(self) -> None:
        mode = attribute(_CFG_MODE, struct.pack("!IBx", _COPIED_BYTES, _COPY_PACKET))
        each = attribute(_CFG_THRESHOLD, struct.pack("!I", 1))
        request = attribute(_CFG_CMD, _BIND) + mode + each
        flags = attribute(_CFG_FLAGS, _WITH_CONNTRACK) if self.tells_connections else b""
        self._configure(request + flags, _F_ACK)
        code = self._answer()
        if code == errno.EOPNOTSUPP and flags:
            self.tells_connections = False
            self._configure(request, _F_ACK)
            code = self._answer()
        # EPERM is what the kernel says of a group that has a reader.
        if code in {errno.EBUSY, errno.EPERM}:
            raise ConflictError(
                f"somebody else reads log group {self._group} of nfnetlink already, or CAP_NET_ADMIN is missing",
                hint="stop the other `datapath drops`; /proc/net/netfilter/nfnetlink_log shows its port id",
            )
        if code:
            raise KernelError("watch logged packets", os.strerror(code), errno=code)
        self._is_bound = True

    def _unbind(self) -> None:
        """An answer would find no room in a full queue: the kernel has done it when `send` returns."""
        if self._is_bound:
            self._configure(attribute(_CFG_CMD, _UNBIND), 0)
            self._is_bound = False
            for _ in self._datagrams():
                pass

    def _configure(self, body: bytes, flags: int) -> None:
        self._sequence += 1
        message = _NFGENMSG.pack(socket.AF_UNSPEC, 0, self._group) + body
        header = HEADER.pack(16 + len(message), _CONFIG, _F_REQUEST | flags, self._sequence, 0)
        try:
            self._socket.send(header + message)
        except OSError as error:
            raise KernelError("watch logged packets", str(error), errno=error.errno or 0) from error

    def _answer(self) -> int:
        """Errno of the acknowledgement, which is in the queue already; packets before it are only counted."""
        for data in self._datagrams():
            for kind, sequence, _, body in messages(data):
                if kind == _ERROR and sequence == self._sequence:
                    return -int(struct.unpack_from("=i", body)[0])
        raise KernelError("watch logged packets", "the kernel's answer was lost", errno=errno.ENOBUFS)


def _packets(data: bytes) -> Iterator[LoggedPacket]:
    for kind, _, _, body in messages(data):
        if kind == _PACKET:
            packet = _packet(dict(attributes(bytes(body), _NFGENMSG.size)))
            if packet is not None:
                yield packet


def _packet(found: dict[int, bytes]) -> LoggedPacket | None:
    payload = found.get(_PAYLOAD, b"")
    parsed = _parse(payload)
    if parsed is None:
        return None
    source, destination, protocol, offset = parsed
    ports = (0, 0)
    if protocol in _WITH_PORTS and offset and len(payload) >= offset + 4:
        ports = struct.unpack_from("!HH", payload, offset)
    before = _original_source(found.get(_CT, b""), source.version)
    carried = None
    if before is not None:
        carried = source if source != before[0] else None
        source, ports = before[0], (before[1] if protocol in _WITH_PORTS else 0, ports[1])
    ifindex = int.from_bytes(found.get(_IFINDEX_OUT) or found.get(_IFINDEX_IN, b""), "big")
    prefix = text(found.get(_PREFIX, b""))
    return LoggedPacket(
        prefix,
        time.time_ns(),
        device_name(ifindex) if ifindex else "",
        source,
        destination,
        protocol,
        ports[0],
        ports[1],
        carried,
    )


def _original_source(connection: bytes, version: int) -> tuple[IPv4Address | IPv6Address, int] | None:
    """Address and port that a connection was opened from; None where the packet belongs to none."""
    original = dict(attributes(dict(attributes(connection)).get(_TUPLE_ORIG, b"")))
    address = dict(attributes(original.get(_TUPLE_IP, b""))).get(_TUPLE_SOURCE[version])
    if address is None or len(address) not in {4, 16}:
        return None
    port = dict(attributes(original.get(_TUPLE_PROTO, b""))).get(_SOURCE_PORT, b"")
    return ip_address(address), int.from_bytes(port, "big")


def _parse(data: bytes) -> tuple[IPv4Address | IPv6Address, IPv4Address | IPv6Address, int, int] | None:
    """Addresses, protocol, and where its header begins; 0 for a fragment without one."""
    version = data[0] >> 4 if data else 0
    if version == 4 and len(data) >= 20:
        is_first = not int.from_bytes(data[6:8], "big") & 0x1FFF
        offset = (data[0] & 0x0F) * 4 if is_first else 0
        return IPv4Address(data[12:16]), IPv4Address(data[16:20]), data[9], offset
    if version == 6 and len(data) >= 40:
        protocol, offset = _behind_extensions(data)
        return IPv6Address(data[8:24]), IPv6Address(data[24:40]), protocol, offset
    return None


def _behind_extensions(data: bytes) -> tuple[int, int]:
    protocol, offset = data[6], 40
    for _ in range(_EXTENSIONS_MAX):
        if protocol not in {_HOP_BY_HOP, _ROUTING, _FRAGMENT, _OPTIONS} or len(data) < offset + 8:
            break
        if protocol == _FRAGMENT:
            if int.from_bytes(data[offset + 2 : offset + 4], "big") & 0xFFF8:
                return data[offset], 0
            protocol, offset = data[offset], offset + 8
        else:
            protocol, offset = data[offset], offset + (data[offset + 1] + 1) * 8
    return protocol, offset
