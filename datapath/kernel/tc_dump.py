# SPDX-License-Identifier: Apache-2.0
"""Dumps of qdiscs and filters straight from rtnetlink.

pyroute2 0.9 does not decode the program id of a bpf filter (`TCA_BPF_ID`), and a filter dump is a request per
device: with 4,000 devices the generic decoder would take seconds.
"""

from __future__ import annotations

import socket
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from datapath.kernel.netlink import Netlink, attributes

if TYPE_CHECKING:
    from types import TracebackType

# linux/rtnetlink.h, linux/pkt_cls.h
_RTM_GETQDISC: Final = 38
_RTM_GETTFILTER: Final = 46
_TCA_KIND: Final = 1
_TCA_OPTIONS: Final = 2
_TCA_BPF_NAME: Final = 7
_TCA_BPF_ID: Final = 11
_TCMSG: Final = struct.Struct("=BxxxiIII")


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


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _decode(payload: bytes) -> TcObject:
    _, ifindex, handle, parent, info = _TCMSG.unpack_from(payload)
    found = dict(attributes(payload, _TCMSG.size))
    kind = _text(found.get(_TCA_KIND, b""))
    program_id, name = 0, ""
    if kind == "bpf":
        options = dict(attributes(found.get(_TCA_OPTIONS, b"")))
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
        self._netlink = Netlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._netlink.close()

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
        body = _TCMSG.pack(socket.AF_UNSPEC, ifindex, 0, parent, 0)
        return [_decode(payload) for payload in self._netlink.dump("tc objects", message_type, body)]
