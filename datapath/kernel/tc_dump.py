# SPDX-License-Identifier: Apache-2.0
"""Qdiscs and filters as the kernel lists them."""

from __future__ import annotations

import errno
import functools
import socket
import struct
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from datapath.kernel.netlink import Request
from datapath.kernel.netlink_messages import ATTRIBUTE, attribute, attributes, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datapath.kernel.netlink import Netlink

# linux/rtnetlink.h, linux/pkt_cls.h
_RTM_GETQDISC: Final = 38
_RTM_GETTFILTER: Final = 46
_TCA_KIND: Final = 1
_TCA_OPTIONS: Final = 2
_TCA_BPF_NAME: Final = 7
_TCA_BPF_ID: Final = 11

#: struct tcmsg: family, ifindex, handle, parent, info.
TCMSG: Final = struct.Struct("=BxxxiIII")
_BEHIND_IFINDEX: Final = 8
_REST: Final = struct.Struct("=III")
_ALIKE_KEPT: Final = 64


class TcPlace(NamedTuple):
    """Where one filter may be.

    Attributes:
        info: priority in the upper half, protocol in network byte order in the lower.
    """

    ifindex: int
    parent: int
    handle: int
    info: int
    kind: str


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


def qdisc_devices(netlink: Netlink, kinds: frozenset[str], ifindex: int = 0) -> frozenset[int]:
    """Devices of the namespace that have a qdisc of one of these kinds; or that one device, if it has.

    Raises:
        KernelError: netlink failed.
    """
    # The kernel ignores the ifindex of a qdisc dump: filter here.
    # Two a device, and the kernel puts the kind first: none is taken apart.
    wanted = tuple(ATTRIBUTE.pack(5 + len(kind), _TCA_KIND) + kind.encode() + b"\0" for kind in kinds)
    bodies = netlink.dump("qdiscs", _RTM_GETQDISC, TCMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    found = frozenset(TCMSG.unpack_from(body)[1] for body in bodies if body.startswith(wanted, TCMSG.size))
    return found & {ifindex} if ifindex else found


def filters(netlink: Netlink, ifindex: int, parent: int) -> list[TcObject]:
    """All filters at one hook of one device; nothing where device or qdisc do not exist.

    Raises:
        KernelError: netlink failed.
    """
    found = _dump(netlink, "tc filters", _RTM_GETTFILTER, ifindex, parent)
    return [item for item in found if item.handle]


def find(netlink: Netlink, places: Sequence[TcPlace]) -> list[TcObject | int | None]:
    """The filter in each of these places, many to a system call.

    Returns:
        for each place its filter, None where nothing is at that priority and handle, or an errno where the kernel
        cannot say: a filter of another kind or protocol has that priority, or the device is gone.

    Raises:
        KernelError: netlink failed.
    """
    kinds = {kind: attribute(_TCA_KIND, kind.encode() + b"\0") for kind in {place.kind for place in places}}
    requests = [
        Request(
            _RTM_GETTFILTER,
            0,
            TCMSG.pack(socket.AF_UNSPEC, place.ifindex, place.handle, place.parent, place.info)
            + kinds[place.kind],
        )
        for place in places
    ]
    answers = netlink.ask("tc filters", requests)
    return [
        _decode(answer) if isinstance(answer, bytes) else None if answer == errno.ENOENT else answer
        for answer in answers
    ]


def _dump(netlink: Netlink, what: str, message_type: int, ifindex: int, parent: int) -> list[TcObject]:
    request = TCMSG.pack(socket.AF_UNSPEC, ifindex, 0, parent, 0)
    return [_decode(body) for body in netlink.dump(what, message_type, request)]


def _decode(body: bytes) -> TcObject:
    # Thousands of the same filter differ in their device alone.
    return TcObject(TCMSG.unpack_from(body)[1], *_decode_rest(body[_BEHIND_IFINDEX:]))


@functools.lru_cache(maxsize=_ALIKE_KEPT)
def _decode_rest(rest: bytes) -> tuple[str, int, int, int, int, str]:
    """What is behind the ifindex, in the order of `TcObject`."""
    handle, parent, info = _REST.unpack_from(rest)
    found = dict(attributes(rest, _REST.size))
    kind = text(found.get(_TCA_KIND, b""))
    program_id, name = 0, ""
    if kind == "bpf":
        options = dict(attributes(found.get(_TCA_OPTIONS, b"")))
        program_id = int.from_bytes(options.get(_TCA_BPF_ID, b"")[:4], sys.byteorder)
        name = text(options.get(_TCA_BPF_NAME, b""))
    return kind, handle, parent, info >> 16, program_id, name
