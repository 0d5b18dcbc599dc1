# SPDX-License-Identifier: Apache-2.0
"""Dumps of qdiscs and filters straight from rtnetlink.

pyroute2 0.9 does not decode the program id of a bpf filter (`TCA_BPF_ID`), and a filter dump is a request per
device: with 4,000 devices the generic decoder would take seconds.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from datapath.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

# linux/netlink.h, linux/rtnetlink.h, linux/pkt_cls.h
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLM_F_REQUEST: Final = 0x001
_NLM_F_DUMP: Final = 0x300
_RTM_GETQDISC: Final = 38
_RTM_GETTFILTER: Final = 46
_TCA_KIND: Final = 1
_TCA_OPTIONS: Final = 2
_TCA_BPF_NAME: Final = 7
_TCA_BPF_ID: Final = 11
_NLA_TYPE_MASK: Final = 0x3FFF

_NLMSGHDR: Final = struct.Struct("=IHHII")
_TCMSG: Final = struct.Struct("=BxxxiIII")
_NLATTR: Final = struct.Struct("=HH")
_RECEIVE_BYTES: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class TcObject:
    """A qdisc or filter.

    Attributes:
        handle: 0 for the entry that the kernel reports once per filter priority.
        priority: of a filter.
        program_id: of a bpf filter, otherwise 0.
        name: of a bpf filter, otherwise empty.
    """

    ifindex: int
    kind: str
    handle: int
    parent: int
    priority: int
    program_id: int
    name: str


def _attributes(payload: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _NLATTR.size <= len(payload):
        length, kind = _NLATTR.unpack_from(payload, offset)
        if length < _NLATTR.size:
            return
        yield kind & _NLA_TYPE_MASK, payload[offset + _NLATTR.size : offset + length]
        offset += (length + 3) & ~3


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _decode(payload: bytes) -> TcObject:
    _, ifindex, handle, parent, info = _TCMSG.unpack_from(payload)
    attributes = dict(_attributes(payload[_TCMSG.size :]))
    kind = _text(attributes.get(_TCA_KIND, b""))
    program_id, name = 0, ""
    if kind == "bpf":
        options = dict(_attributes(attributes.get(_TCA_OPTIONS, b"")))
        program_id = int.from_bytes(options.get(_TCA_BPF_ID, b"")[:4], sys.byteorder)
        name = _text(options.get(_TCA_BPF_NAME, b""))
    return TcObject(
        ifindex=ifindex,
        kind=kind,
        handle=handle,
        parent=parent,
        priority=info >> 16,
        program_id=program_id,
        name=name,
    )


class TcDump:
    """One rtnetlink socket for many dumps; a context manager."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._sequence = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def qdiscs(self, ifindex: int = 0) -> list[TcObject]:
        """All qdiscs of the namespace, or of one device.

        Raises:
            KernelError: netlink failed.
        """
        # The kernel ignores the ifindex of a qdisc dump: filter here.
        found = self._dump(_RTM_GETQDISC, 0, 0)
        return [qdisc for qdisc in found if ifindex in {0, qdisc.ifindex}]

    def filters(self, ifindex: int, parent: int) -> list[TcObject]:
        """All filters at one hook of one device; nothing where device or qdisc do not exist.

        Raises:
            KernelError: netlink failed.
        """
        return [found for found in self._dump(_RTM_GETTFILTER, ifindex, parent) if found.handle]

    def _dump(self, message_type: int, ifindex: int, parent: int) -> list[TcObject]:
        self._sequence += 1
        body = _TCMSG.pack(socket.AF_UNSPEC, ifindex, 0, parent, 0)
        header = _NLMSGHDR.pack(
            _NLMSGHDR.size + len(body), message_type, _NLM_F_REQUEST | _NLM_F_DUMP, self._sequence, 0
        )
        try:
            self._socket.send(header + body)
            return [_decode(payload) for payload in self._receive()]
        except OSError as error:
            message = error.strerror or str(error)
            raise KernelError("list tc objects", message, errno=error.errno or 0) from error

    def _receive(self) -> Iterator[bytes]:
        while True:
            datagram = self._socket.recv(_RECEIVE_BYTES)
            offset = 0
            while offset + _NLMSGHDR.size <= len(datagram):
                length, kind, _, sequence, _ = _NLMSGHDR.unpack_from(datagram, offset)
                payload = datagram[offset + _NLMSGHDR.size : offset + length]
                offset += (length + 3) & ~3
                if sequence != self._sequence:
                    continue
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", payload)[0]
                    raise OSError(code, os.strerror(code))
                yield payload
