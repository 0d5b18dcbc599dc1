# SPDX-License-Identifier: Apache-2.0
"""What happens in the namespace, as events: rtnetlink and nftables multicast, read cheaply.

A node with a routing daemon sees ten thousand route changes a second that do not concern us: the kernel drops
them before they reach the socket (`kernel/socket_filter.py`). What is left is looked at with `struct`, not
with a netlink library, and becomes an `Event` only if it may concern one of our objects. An event says that
it is worth looking, never what to do: reconciliation reads the kernel itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from datapath.kernel.netlink import NETLINK_NETFILTER, SO_RCVBUFFORCE, SOL_NETLINK, bind_aside
from datapath.kernel.netlink_messages import ATTRIBUTE, TYPE_MASK, messages, text
from datapath.kernel.socket_filter import attach_route_filter
from datapath.plan.nft import TABLE_NAME
from datapath.plan.rtnl import ROUTE_PROTOCOL, TABLE_MAIN

#: linux/netlink.h and linux/netfilter/nfnetlink.h.
_ADD_MEMBERSHIP: Final = 1
_NFNLGRP_NFTABLES: Final = 7
_RECEIVE_BUFFER: Final = 2 * 1024 * 1024
#: RTNLGRP_LINK, TC, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE, IPV4_NETCONF,
#: IPV6_NETCONF.
_ROUTE_GROUPS: Final = (1, 4, 5, 7, 8, 9, 11, 19, 24, 25)
_DATAGRAM_MAX: Final = 65_536
#: In one go, so that a storm cannot keep the loop from anything else.
_READS_MAX: Final = 256
#: pyroute2 numbers its sockets in the bits above the largest process id.
_PID_BITS: Final = 0x3FFFFF

_LINK, _ADDRESS, _ROUTE, _RULE, _QDISC, _FILTER, _NETCONF = 16, 20, 24, 32, 36, 44, 80
_NAMES: Final = {
    _LINK: ("link", "device"),
    _ADDRESS: ("address", "address"),
    _ROUTE: ("route", "route"),
    _RULE: ("rule", "ip rule"),
    _QDISC: ("tc", "qdisc"),
    _FILTER: ("tc", "tc filter"),
    _NETCONF: ("sysctl", "sysctl"),
}
#: The NFT_MSG_* of linux/netfilter/nf_tables.h that a change of a table can consist of.
_NFT_MESSAGES: Final = {
    0: "table added",
    2: "table deleted",
    3: "chain added",
    5: "chain deleted",
    6: "rule added",
    8: "rule deleted",
    9: "map added",
    11: "map deleted",
    12: "map element added",
    14: "map element deleted",
    18: "counter added",
    20: "counter deleted",
}
_NEWGEN: Final = 15
#: NFT_MSG_NEWFLOWTABLE and NFT_MSG_DELFLOWTABLE, and the two bytes of such a message's type.
_FLOWTABLE: Final = {22: "flowtable added", 24: "flowtable deleted"}
_NFNL_SUBSYS_NFTABLES: Final = 10
_FLOWTABLE_TYPES: Final = tuple(struct.pack("=H", _NFNL_SUBSYS_NFTABLES << 8 | kind) for kind in _FLOWTABLE)


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened that may concern us.

    Attributes:
        kind: what sort of object: nft, flowtable, route, rule, link, address, tc, sysctl, or `lost` where the kernel
            had more to say than the socket could hold.
        what: for people.
        by: process and pid, empty where nobody can tell (the kernel itself, a process that is gone).
        at_s: monotonic clock, when it was read.
    """

    kind: str
    what: str
    by: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Interest:
    """What concerns us.

    Attributes:
        devices: names, also of devices that are missing at present.
        tables: routing tables of ours.
        default_routes: those of the main table.
    """

    devices: frozenset[str] = frozenset()
    tables: frozenset[int] = frozenset()
    default_routes: bool = False


class RouteWatch:
    """Links, addresses, routes, rules, tc and rp_filter of the current namespace."""

    def __init__(self) -> None:
        self._socket = _multicast(socket.NETLINK_ROUTE, _ROUTE_GROUPS)
        self._interest = Interest()
        self._indexes: set[int] = set()
        attach_route_filter(self._socket, ROUTE_PROTOCOL, frozenset())

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_more(self) -> bool:
        """Whether something has come in that was not read."""
        return _is_readable(self._socket)

    def close(self) -> None:
        self._socket.close()

    def follow(self, interest: Interest) -> None:
        """Report what concerns these; everything of another network's is passed over from now on."""
        before = self._interest
        if (interest.tables, interest.default_routes) != (before.tables, before.default_routes):
            tables = interest.tables - {TABLE_MAIN}
            attach_route_filter(self._socket, ROUTE_PROTOCOL, tables, default_routes=interest.default_routes)
        self._interest = interest
        self._indexes = {index for index, name in socket.if_nameindex() if name in interest.devices}

    def read(self) -> list[Event]:
        """What has come in; empty where nothing concerns us. Never waits."""
        events: list[Event] = []
        for data in _datagrams(self._socket, events):
            for kind, _, port, message in messages(data):
                if port & _PID_BITS == os.getpid() or not self._concerns(kind, message):
                    continue
                label, noun = _NAMES[kind & ~3]
                verb = "deleted" if kind & 3 == 1 else "added or changed"
                events.append(Event(label, f"{noun} {verb}", process_name(port), time.monotonic()))
        return events

    def _concerns(self, kind: int, message: memoryview) -> bool:
        base = kind & ~3
        if base in (_ROUTE, _LINK):
            return self._route_concerns(message) if base == _ROUTE else self._link_concerns(kind, message)
        if base == _RULE:
            return _rule_concerns(message)
        if base == _ADDRESS:
            # IFA_LOCAL, else IFA_ADDRESS
            return _is_global(_attribute(message, 8, 2) or _attribute(message, 8, 1))
        if base in (_QDISC, _FILTER):
            return struct.unpack_from("=i", message, 4)[0] in self._indexes
        if base == _NETCONF:
            index = _attribute(message, 4, 1)  # NETCONFA_IFINDEX, behind one byte and padding
            return index is not None and _is_ours_or_all(struct.unpack("=i", index)[0], self._indexes)
        return False

    def _route_concerns(self, message: memoryview) -> bool:
        if message[5] == ROUTE_PROTOCOL:
            return True
        table = _attribute(message, 12, 15)  # RTA_TABLE
        number = struct.unpack("=I", table)[0] if table else message[4]
        if self._interest.default_routes and number == TABLE_MAIN and message[1] == 0:  # rtm_dst_len
            return True
        return number in self._interest.tables and number != TABLE_MAIN

    def _link_concerns(self, kind: int, message: memoryview) -> bool:
        (index,) = struct.unpack_from("=i", message, 4)
        name = _attribute(message, 16, 3)  # IFLA_IFNAME
        is_ours = name is not None and text(name) in self._interest.devices
        was_ours = index in self._indexes
        if is_ours and kind == _LINK:
            self._indexes.add(index)
        elif was_ours:
            self._indexes.discard(index)
        return is_ours or was_ours


class NftWatch:
    """Changes of our nftables table by others, and flowtables that come and go."""

    def __init__(self) -> None:
        self._socket = _multicast(NETLINK_NETFILTER, (_NFNLGRP_NFTABLES,))
        self._name = TABLE_NAME.encode() + b"\0"
        self._seen = ""
        self._flowtables = ""

    def fileno(self) -> int:
        return self._socket.fileno()

    def has_more(self) -> bool:
        """Whether something has come in that was not read."""
        return _is_readable(self._socket)

    def close(self) -> None:
        self._socket.close()

    def read(self) -> list[Event]:
        """What has come in, once per transaction; empty where nothing concerns us. Never waits."""
        events: list[Event] = []
        for data in _datagrams(self._socket, events):
            # kube-proxy writes thousands of elements into its own table: one search instead of a parser.
            if not (self._seen or self._flowtables or data[4] == _NEWGEN or self._may_concern(data)):
                continue
            for kind, _, _, message in messages(data):
                if kind & 0xFF == _NEWGEN:
                    events += self._end_of_transaction(message)
                elif kind & 0xFF in _FLOWTABLE:
                    self._flowtables = _FLOWTABLE[kind & 0xFF]
                elif _attribute(message, 4, 1) == self._name:
                    self._seen = _NFT_MESSAGES.get(kind & 0xFF, "table changed")
        return events

    def _may_concern(self, data: bytes) -> bool:
        return self._name in data or any(kind in data for kind in _FLOWTABLE_TYPES)

    def _end_of_transaction(self, message: memoryview) -> Iterator[Event]:
        told = {"nft": self._seen, "flowtable": self._flowtables}
        self._seen = self._flowtables = ""
        pid_bytes, name = _attribute(message, 4, 2), _attribute(message, 4, 3)  # NFTA_GEN_PROC_PID, _NAME
        pid = struct.unpack("!I", pid_bytes)[0] if pid_bytes else 0
        comm = text(name) if name else ""
        by = f"{comm or 'process'}[{pid}]" if pid else comm
        for kind, what in told.items():
            if what and pid != os.getpid():
                yield Event(kind, what, by, time.monotonic())


def process_name(port: int) -> str:
    """The process behind a netlink port id, as far as it can be known: most bind to their own pid."""
    pid = port & _PID_BITS
    if not pid:
        return ""
    try:
        return f"{Path(f'/proc/{pid}/comm').read_text(encoding='utf-8', errors='replace').strip()}[{pid}]"
    except OSError:
        return f"process {pid}, which is gone" if port == pid else ""


def _multicast(protocol: int, groups: tuple[int, ...]) -> socket.socket:
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, protocol
    )
    with contextlib.suppress(PermissionError):  # a smaller buffer only means to look again more often
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _RECEIVE_BUFFER)
    bind_aside(sock)
    for group in groups:
        sock.setsockopt(SOL_NETLINK, _ADD_MEMBERSHIP, group)
    return sock


def _is_readable(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _datagrams(sock: socket.socket, events: list[Event]) -> Iterator[bytes]:
    for _ in range(_READS_MAX):
        try:
            yield sock.recv(_DATAGRAM_MAX)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            events.append(Event("lost", "more events than the socket holds", "", time.monotonic()))


def _attribute(message: memoryview, offset: int, wanted: int) -> bytes | None:
    """Payload of the first attribute of a type, behind a header of `offset` bytes."""
    while offset + ATTRIBUTE.size <= len(message):
        length, kind = ATTRIBUTE.unpack_from(message, offset)
        if length < ATTRIBUTE.size:
            return None
        if kind & TYPE_MASK == wanted:
            return bytes(message[offset + ATTRIBUTE.size : offset + length])
        offset += (length + 3) & ~3
    return None


def _rule_concerns(message: memoryview) -> bool:
    """Ours, and the kernel's own for VRFs: that comes with the first of them, and must not go."""
    is_l3mdev = _attribute(message, 12, 19) == b"\1"  # FRA_L3MDEV
    return is_l3mdev or _attribute(message, 12, 21) == bytes([ROUTE_PROTOCOL])  # FRA_PROTOCOL


def _is_global(address: bytes | None) -> bool:
    """Pods' devices come with link-local addresses all day: those are in nobody's source list."""
    if not address:
        return True
    parsed = ip_address(address)
    return not (parsed.is_link_local or parsed.is_loopback)


def _is_ours_or_all(index: int, indexes: set[int]) -> bool:
    return index < 0 or index in indexes  # NETCONFA_IFINDEX_ALL is -1, _DEFAULT is -2
