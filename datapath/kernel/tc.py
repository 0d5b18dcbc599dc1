# SPDX-License-Identifier: Apache-2.0
"""tc filters: at most one of ours at each hook of a device, and what else is there.

Ours is the bpf filter with `TC_PRIORITY`, `TC_HANDLE` and `FILTER_NAME`; a filter of someone else in that
place is a conflict, never replaced. The namespace is that of the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from datapath.errors import ConflictError, KernelError
from datapath.kernel import tc_dump
from datapath.kernel.netlink import F_CREATE, F_EXCL, F_REPLACE, Netlink, Request
from datapath.kernel.netlink_messages import attribute
from datapath.kernel.tc_dump import TCMSG
from datapath.plan.tc import Direction
from datapath.points import reached

#: Early, because a filter that answers TC_ACT_OK ends the chain; 1 is what most others choose explicitly,
#: 49152 and down is what the kernel chooses for those that do not.
TC_PRIORITY: Final = 77
TC_HANDLE: Final = 0x6470
FILTER_NAME: Final = "datapath"

# linux/rtnetlink.h, linux/pkt_cls.h, linux/if_ether.h
_NEWQDISC, _DELQDISC, _NEWTFILTER, _DELTFILTER = 36, 37, 44, 45
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS = 6, 7, 8
_TCA_BPF_FLAG_ACT_DIRECT: Final = 1
_ETH_P_ALL: Final = 3
_INFO: Final = TC_PRIORITY << 16 | socket.htons(_ETH_P_ALL)
# linux/pkt_sched.h: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS / TC_H_MIN_EGRESS). The older `ingress` qdisc
# takes filters at the first place only.
_PARENTS: Final = {Direction.INGRESS: 0xFFFFFFF2, Direction.EGRESS: 0xFFFFFFF3}
_CLSACT: Final = 0xFFFFFFF1
_CLSACT_HANDLE: Final = 0xFFFF0000
#: linux/sockios.h
_SIOCGIFINDEX: Final = 0x8933
_CLSACT_KINDS: Final = frozenset({"clsact", "ingress"})
#: Of a question for one filter: no such device; no such qdisc, or a filter of another kind has that priority.
_NOTHING_THERE: Final = frozenset({errno.ENODEV, errno.EINVAL})


@dataclass(frozen=True, slots=True)
class TcFilter:
    """One filter of a device.

    Attributes:
        program_id: of a bpf filter, otherwise 0.
        name: the name that a bpf filter was given, otherwise empty.
    """

    ifindex: int
    direction: Direction
    kind: str
    priority: int
    handle: int
    program_id: int = 0
    name: str = ""

    @property
    def is_our_place(self) -> bool:
        """Whether it sits where ours would: at our priority, alone there if it is of another kind."""
        return self.priority == TC_PRIORITY and (self.handle == TC_HANDLE or self.kind != "bpf")

    @property
    def is_ours(self) -> bool:
        """Whether place and name are ours."""
        return self.is_our_place and self.kind == "bpf" and self.name == FILTER_NAME


@dataclass(frozen=True, slots=True)
class TcState:
    """What is in our place on all devices of the namespace.

    Attributes:
        filters: of one direction.
        clsact: ifindexes of devices with a qdisc that takes ingress filters.
    """

    filters: tuple[TcFilter, ...]
    clsact: frozenset[int]


def ifindexes() -> dict[str, int]:
    """Every device of the namespace by name."""
    return {name: index for index, name in socket.if_nameindex()}


def indexes_of(ifnames: Iterable[str]) -> dict[str, int]:
    """Some devices by name, 0 for one that is not there.

    For who asks again and again: for its list of all, the C library takes 1.5 kB a device and keeps it.
    """
    found: dict[str, int] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in ifnames:
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFINDEX, struct.pack("=16s24x", name.encode()))
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise KernelError(
                        f"look for device {name}", str(error), errno=error.errno or 0
                    ) from error
                found[name] = 0
            else:
                (found[name],) = struct.unpack_from("=i", answer, 16)
    return found


def _filters(netlink: Netlink, ifindex: int, direction: Direction) -> list[TcFilter]:
    dumped = tc_dump.filters(netlink, ifindex, _PARENTS[direction])
    return [_filter(found, ifindex, direction) for found in dumped]


def _filter(found: tc_dump.TcObject, ifindex: int, direction: Direction) -> TcFilter:
    return TcFilter(
        ifindex=ifindex,
        direction=direction,
        kind=found.kind,
        priority=found.priority,
        handle=found.handle,
        program_id=found.program_id,
        name=found.name,
    )


def _all_filters(netlink: Netlink, ifindex: int) -> list[TcFilter]:
    return [found for direction in Direction for found in _filters(netlink, ifindex, direction)]


def _clsact_devices(netlink: Netlink, ifindex: int = 0) -> frozenset[int]:
    return tc_dump.qdisc_devices(netlink, _CLSACT_KINDS, ifindex)


def clsact_devices() -> frozenset[int]:
    """Ifindexes of devices with a qdisc that takes ingress filters.

    Raises:
        KernelError: netlink failed.
    """
    with Netlink() as netlink:
        return _clsact_devices(netlink)


def observe_our_place(direction: Direction, devices: frozenset[int] | None = None) -> TcState:
    """What is in our place on each device of the namespace: our filter, or somebody else's.

    Args:
        direction: which hook.
        devices: as `clsact_devices`, if they were read just now: only those can have filters.

    Raises:
        KernelError: netlink failed.
    """
    devices = clsact_devices() if devices is None else devices
    if not devices:
        return TcState(filters=(), clsact=devices)
    with Netlink() as netlink:
        indexes = sorted(devices)
        parent, info = _PARENTS[direction], _INFO
        places = [tc_dump.TcPlace(index, parent, TC_HANDLE, info, "bpf") for index in indexes]
        filters: list[TcFilter] = []
        for index, found in zip(indexes, tc_dump.find(netlink, places), strict=True):
            if isinstance(found, tc_dump.TcObject):
                filters.append(_filter(found, index, direction))
            elif found is not None:
                filters += [item for item in _filters(netlink, index, direction) if item.is_our_place]
    return TcState(filters=tuple(filters), clsact=devices)


def _refuse_foreign(ifname: str, filters: list[TcFilter]) -> None:
    for found in filters:
        if found.is_our_place and not found.is_ours:
            raise ConflictError(
                f"{ifname}: tc {found.direction} priority {TC_PRIORITY} is taken by a {found.kind} filter "
                f"(handle {found.handle:#x}{f', name {found.name}' if found.name else ''})",
                hint="remove that filter or give it another priority",
            )


def our_program(ifindex: int, direction: Direction) -> int | None:
    """Id of the program that our filter of a device runs; None where there is no such filter, or device.

    Raises:
        KernelError: netlink failed.
    """
    place = tc_dump.TcPlace(ifindex, _PARENTS[direction], TC_HANDLE, _INFO, "bpf")
    with Netlink() as netlink:
        (found,) = tc_dump.find(netlink, [place])
    if not isinstance(found, tc_dump.TcObject) or not _filter(found, ifindex, direction).is_ours:
        return None
    return found.program_id


def attach_filter(ifname: str, program_fd: int, direction: Direction = Direction.INGRESS) -> None:
    """Attach the program at a hook of a device, or replace our older one there in one step.

    Raises:
        ConflictError: a filter of someone else is in our place; nothing was changed.
        KernelError: no such device, or the kernel refused.
    """
    operation = f"attach the eBPF program to {ifname}"
    try:
        index = socket.if_nametoindex(ifname)
    except OSError as error:
        raise KernelError(operation, f"there is no device {ifname}", errno=errno.ENODEV) from error
    with Netlink() as netlink:
        _refuse_foreign(ifname, _filters(netlink, index, direction))
        if not _clsact_devices(netlink, index):
            _add_clsact(netlink, operation, index)
        reached(f"attach the {direction} filter to {ifname}")
        _change(netlink, operation, _new_filter(index, program_fd, direction))


def attach_filters(ifnames: Sequence[str], program_fd: int, direction: Direction = Direction.INGRESS) -> None:
    """`attach_filter` for many devices: one dump of qdiscs for all of them, and all changes in few system calls.

    Raises:
        ConflictError: a filter of someone else is in our place on one of them; nothing was changed.
        KernelError: a device is missing, and nothing was changed; or the kernel refused one, and others are done.
    """
    known = ifindexes() if ifnames else {}
    operation = "attach the eBPF program to {}"
    for ifname in ifnames:
        if ifname not in known:
            raise KernelError(operation.format(ifname), f"there is no device {ifname}", errno=errno.ENODEV)
    requests: list[Request] = []
    owners: list[str] = []
    with Netlink() as netlink:
        have_qdisc = _clsact_devices(netlink) if ifnames else frozenset()
        for ifname in ifnames:
            index = known[ifname]
            if index in have_qdisc:
                _refuse_foreign(ifname, _filters(netlink, index, direction))
            else:
                reached("add clsact")
                requests.append(_clsact_request(_NEWQDISC, F_CREATE | F_EXCL, index))
            reached(f"attach the {direction} filter to {ifname}")
            requests.append(_new_filter(index, program_fd, direction))
            owners += [ifname] * (len(requests) - len(owners))
        for refusal in netlink.change(requests):
            # Somebody was faster with the qdisc: then it is theirs.
            if requests[refusal.number].kind != _NEWQDISC or refusal.errno != errno.EEXIST:
                ifname = owners[refusal.number]
                raise refusal.error(operation.format(ifname))


def _new_filter(ifindex: int, program_fd: int, direction: Direction) -> Request:
    options = (
        attribute(_TCA_BPF_FD, struct.pack("=I", program_fd))
        + attribute(_TCA_BPF_NAME, FILTER_NAME.encode() + b"\0")
        + attribute(_TCA_BPF_FLAGS, struct.pack("=I", _TCA_BPF_FLAG_ACT_DIRECT))
    )
    return _filter_request(_NEWTFILTER, F_CREATE | F_REPLACE, ifindex, direction, options)


def _filter_request(
    kind: int, flags: int, ifindex: int, direction: Direction, options: bytes = b""
) -> Request:
    body = TCMSG.pack(socket.AF_UNSPEC, ifindex, TC_HANDLE, _PARENTS[direction], _INFO)
    body += attribute(_TCA_KIND, b"bpf\0")
    return Request(kind, flags, body + attribute(_TCA_OPTIONS, options) if options else body)


def _clsact_request(kind: int, flags: int, ifindex: int) -> Request:
    body = TCMSG.pack(socket.AF_UNSPEC, ifindex, _CLSACT_HANDLE, _CLSACT, 0)
    return Request(kind, flags, body + attribute(_TCA_KIND, b"clsact\0"))


def _change(
    netlink: Netlink, operation: str, request: Request, *, harmless: frozenset[int] = frozenset()
) -> None:
    for refusal in netlink.change([request]):
        if refusal.errno not in harmless:
            raise refusal.error(operation)


def _add_clsact(netlink: Netlink, operation: str, ifindex: int) -> None:
    reached("add clsact")
    request = _clsact_request(_NEWQDISC, F_CREATE | F_EXCL, ifindex)
    # Somebody was faster: then it is theirs.
    _change(netlink, operation, request, harmless=frozenset({errno.EEXIST}))


def detach_filters(ifnames: Sequence[str], direction: Direction = Direction.INGRESS) -> frozenset[str]:
    """Remove our filters, all in few system calls; nothing of others.

    Args:
        ifnames: the devices; one that is gone is no error.
        direction: the hook.

    Returns:
        where ours was.

    Raises:
        KernelError: the kernel refused one; others are gone.
    """
    known = {name: index for name, index in indexes_of(ifnames).items() if index}
    places = [
        tc_dump.TcPlace(index, _PARENTS[direction], TC_HANDLE, _INFO, "bpf") for index in known.values()
    ]
    if not places:
        return frozenset()
    names = {index: name for name, index in known.items()}
    with Netlink() as netlink:
        ours = []
        for place, found in zip(places, tc_dump.find(netlink, places), strict=True):
            if isinstance(found, int) and found not in _NOTHING_THERE:
                operation = f"look for the eBPF program at {names[place.ifindex]}"
                raise KernelError(operation, os.strerror(found), errno=found)
            if isinstance(found, tc_dump.TcObject) and _filter(found, place.ifindex, direction).is_ours:
                ours.append(place.ifindex)
        for index in ours:
            reached(f"delete the {direction} filter of {names[index]}")
        for refusal in netlink.change([_filter_request(_DELTFILTER, 0, index, direction) for index in ours]):
            operation = f"detach the eBPF program from {names[ours[refusal.number]]}"
            raise KernelError(operation, refusal.reason, errno=refusal.errno)
    return frozenset(names[index] for index in ours)


def remove_clsact(*ifnames: str) -> None:
    """Remove clsact qdiscs that we made, unless a filter of anyone is left on them.

    Raises:
        KernelError: the kernel refused.
    """
    if not ifnames:
        return
    known = ifindexes()
    gone = frozenset({errno.ENOENT, errno.EINVAL, errno.ENODEV})
    with Netlink() as netlink:
        devices = _clsact_devices(netlink)
        unused = [
            name for name in ifnames if known.get(name) in devices and not _all_filters(netlink, known[name])
        ]
        for name in unused:
            reached(f"delete clsact from {name}")
        for refusal in netlink.change([_clsact_request(_DELQDISC, 0, known[name]) for name in unused]):
            if refusal.errno not in gone:
                operation = f"remove clsact from {unused[refusal.number]}"
                raise refusal.error(operation)
