# SPDX-License-Identifier: Apache-2.0
"""tc: our one filter at the ingress of a device, and what else is attached there.

Ours is the bpf filter with `TC_PRIORITY`, `TC_HANDLE` and `FILTER_NAME`; a filter of someone else in that
place is a conflict, never replaced. The namespace is that of the process.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from datapath.errors import ConflictError, KernelError
from datapath.kernel.tc_dump import TcDump
from datapath.points import reached

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Early, because a filter that answers TC_ACT_OK ends the chain; 1 is what most others choose explicitly,
#: 49152 and down is what the kernel chooses for those that do not.
TC_PRIORITY: Final = 77
TC_HANDLE: Final = 0x6470
FILTER_NAME: Final = "datapath"

# linux/pkt_sched.h: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS / TC_H_MIN_EGRESS). The older `ingress` qdisc
# takes filters at the same place.
_INGRESS: Final = 0xFFFFFFF2
_EGRESS: Final = 0xFFFFFFF3
_CLSACT_KINDS: Final = frozenset({"clsact", "ingress"})


@dataclass(frozen=True, slots=True)
class IngressFilter:
    """One filter at a device's ingress.

    Attributes:
        program_id: of a bpf filter, otherwise 0.
        name: the name that a bpf filter was given, otherwise empty.
    """

    ifindex: int
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
    """Ingress of all devices of the namespace.

    Attributes:
        filters: every ingress filter of every device.
        clsact: ifindexes of devices with a qdisc that takes ingress filters.
    """

    filters: tuple[IngressFilter, ...]
    clsact: frozenset[int]


@dataclass(frozen=True, slots=True)
class AttachResult:
    """What attaching changed besides the filter.

    Attributes:
        created_clsact: the device had none before; to be remembered for `detach_filter`.
    """

    created_clsact: bool


@contextlib.contextmanager
def _netlink(operation: str) -> Iterator[Any]:
    try:
        with IPRoute() as ipr:
            yield ipr
    except NetlinkError as error:
        raise KernelError(operation, os.strerror(error.code), errno=error.code) from error
    except OSError as error:
        raise KernelError(operation, str(error), errno=error.errno or 0) from error


def ifindexes() -> dict[str, int]:
    """Every device of the namespace by name."""
    return {name: index for index, name in socket.if_nameindex()}


def _ifindex(operation: str, ifname: str) -> int:
    try:
        return socket.if_nametoindex(ifname)
    except OSError as error:
        raise KernelError(operation, f"there is no device {ifname}", errno=errno.ENODEV) from error


def _filters(dump: TcDump, ifindex: int, parent: int = _INGRESS) -> list[IngressFilter]:
    return [
        IngressFilter(
            ifindex=ifindex,
            kind=found.kind,
            priority=found.priority,
            handle=found.handle,
            program_id=found.program_id,
            name=found.name,
        )
        for found in dump.filters(ifindex, parent)
    ]


def _clsact_devices(dump: TcDump, ifindex: int = 0) -> frozenset[int]:
    return frozenset(qdisc.ifindex for qdisc in dump.qdiscs(ifindex) if qdisc.kind in _CLSACT_KINDS)


def observe_tc() -> TcState:
    """All ingress filters of the namespace.

    Raises:
        KernelError: netlink failed.
    """
    with TcDump() as dump:
        # One dump for all devices: only those with such a qdisc can have filters.
        devices = _clsact_devices(dump)
        filters = [found for index in sorted(devices) for found in _filters(dump, index)]
    return TcState(filters=tuple(filters), clsact=devices)


def _refuse_foreign(ifname: str, filters: list[IngressFilter]) -> None:
    for found in filters:
        if found.is_our_place and not found.is_ours:
            raise ConflictError(
                f"{ifname}: tc ingress priority {TC_PRIORITY} is taken by a {found.kind} filter "
                f"(handle {found.handle:#x}{f', name {found.name}' if found.name else ''})",
                hint="remove that filter or give it another priority",
            )


def attach_filter(ifname: str, program_fd: int) -> AttachResult:
    """Attach the program at the ingress of a device, or replace our older one there in one step.

    Raises:
        ConflictError: a filter of someone else is in our place; nothing was changed.
        KernelError: no such device, or the kernel refused.
    """
    operation = f"attach the eBPF program to {ifname}"
    index = _ifindex(operation, ifname)
    with TcDump() as dump, _netlink(operation) as ipr:
        _refuse_foreign(ifname, _filters(dump, index))
        created = not _clsact_devices(dump, index) and _add_clsact(ipr, index)
        reached(f"attach the filter to {ifname}")
        ipr.tc(
            "replace-filter",
            "bpf",
            index=index,
            parent=_INGRESS,
            handle=TC_HANDLE,
            prio=TC_PRIORITY,
            fd=program_fd,
            name=FILTER_NAME,
            direct_action=True,
        )
    return AttachResult(created_clsact=created)


def _add_clsact(ipr: Any, ifindex: int) -> bool:
    reached("add clsact")
    try:
        ipr.tc("add", "clsact", index=ifindex)
    except NetlinkError as error:
        if error.code == errno.EEXIST:  # someone was faster: then it is theirs
            return False
        raise
    return True


def detach_filter(ifname: str, *, remove_clsact: bool) -> bool:
    """Remove our filter; nothing of others.

    Args:
        ifname: the device; one that is gone is no error.
        remove_clsact: the qdisc was made by us. It is removed only if no filter of anyone is left on it.

    Returns:
        whether our filter was there.

    Raises:
        KernelError: the kernel refused.
    """
    operation = f"detach the eBPF program from {ifname}"
    try:
        index = socket.if_nametoindex(ifname)
    except OSError:
        return False
    with TcDump() as dump, _netlink(operation) as ipr:
        ours = any(found.is_ours for found in _filters(dump, index))
        if ours:
            reached(f"delete the filter of {ifname}")
            ipr.tc("del-filter", "bpf", index=index, parent=_INGRESS, handle=TC_HANDLE, prio=TC_PRIORITY)
        if remove_clsact and not any(_filters(dump, index, hook) for hook in (_INGRESS, _EGRESS)):
            reached(f"delete clsact from {ifname}")
            _delete_clsact(ipr, index)
    return ours


def _delete_clsact(ipr: Any, ifindex: int) -> None:
    try:
        ipr.tc("del", "clsact", index=ifindex)
    except NetlinkError as error:
        if error.code not in {errno.ENOENT, errno.EINVAL, errno.ENODEV}:
            raise
