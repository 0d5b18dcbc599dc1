# SPDX-License-Identifier: Apache-2.0
"""Which devices carry our programs, by tcx or by a filter, and how they get and lose them.

A filter is ours by place and name (`kernel/tc.py`), a tcx program by its own name, which the kernel gives to nobody
else by itself. Where both are there, an attach was interrupted, or an older version used a filter: both
run, the program gives the same answer to a packet that it sees twice, and `attach` takes the surplus one away.
Where devices are many, filters serve them at first, and `move_to_tcx` is for those, one at a time.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from datapath.errors import KernelError
from datapath.kernel import tc
from datapath.kernel.bpf import abi, libbpf, tcx
from datapath.plan.tc import FEW_DEVICES, MANY_DEVICES, Direction, Hook
from datapath.points import reached

#: `clsact` makes a kernel that has tcx behave as one that has not: for tests.
ENVIRONMENT: Final = "DATAPATH_TC_HOOK"

PROGRAM_NAMES: Final[Mapping[Direction, str]] = {
    Direction.INGRESS: abi.PROGRAM_NAME,
    Direction.EGRESS: abi.STEERING_NAME,
}


@dataclass(frozen=True, slots=True)
class Attached:
    """Our programs at one direction of all devices.

    Attributes:
        programs: id by name of the device; where there are several, the one that is attached as this kernel prefers.
        ids: of all programs of ours.
        surplus: devices where one more of ours is attached, or one in the other way.
        conflicts: device and description of each filter of someone else in our place.
        ahead: device and name of each tcx program of someone else that sees packets before ours.
        filtered: with tcx, devices that have a filter all the same, because they were many; `move_to_tcx` is for them.
        taken: with tcx, devices where a filter of someone else leaves no place for ours.
    """

    programs: Mapping[str, int] = field(default_factory=dict)
    ids: frozenset[int] = frozenset()
    surplus: frozenset[str] = frozenset()
    conflicts: tuple[tuple[str, str], ...] = ()
    ahead: tuple[tuple[str, str], ...] = ()
    filtered: frozenset[str] = frozenset()
    taken: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Attachments:
    """All devices of the namespace, at one direction.

    Attributes:
        ifindexes: every device by name.
        clsact: devices that have a clsact (or ingress) qdisc, whoever made it.
    """

    hook: Hook
    ifindexes: Mapping[str, int]
    attached: Attached
    clsact: frozenset[str]


def preferred_hook() -> Hook:
    """How programs are to be attached here."""
    forced = os.environ.get(ENVIRONMENT) == Hook.CLSACT
    return Hook.CLSACT if forced or not tcx.is_supported() else Hook.TCX


class _Names:
    """Names of programs by id; each is asked for once."""

    def __init__(self) -> None:
        self._known: dict[int, str] = {}

    def of(self, program_id: int) -> str:
        """Empty where the program has gone meanwhile."""
        if program_id not in self._known:
            self._known[program_id] = _name(program_id)
        return self._known[program_id]


def _name(program_id: int) -> str:
    try:
        with libbpf.program_fd_by_id(program_id) as program:
            return libbpf.program_info(program).name
    except KernelError as error:
        if error.errno != errno.ENOENT:  # without the right to look, "not ours" would be a lie
            raise
        return ""


def is_ours(program_id: int, direction: Direction) -> bool:
    """Whether it is a program of ours for this direction; False where it has gone meanwhile.

    Raises:
        KernelError: bpf(2) refused, for want of CAP_SYS_ADMIN, too.
    """
    return _name(program_id) == PROGRAM_NAMES[direction]


def may_be_attached(direction: Direction) -> bool:
    """Whether a program of ours for this direction is loaded at all, in whatever namespace: else none is attached.

    A node has some hundred programs at most, but may have thousands of devices. True where programs cannot be listed
    (without CAP_SYS_ADMIN): the devices tell.

    Raises:
        KernelError: bpf(2) refused for another reason.
    """
    try:
        return any(is_ours(number, direction) for number in libbpf.program_ids())
    except KernelError as error:
        if error.errno != errno.EPERM:
            raise
        return True


def observe_attachments(
    direction: Direction,
    ifindexes: Mapping[str, int] | None = None,
    qdiscs: frozenset[int] | None = None,
) -> Attachments:
    """Everything that is attached, read from the kernel only.

    Args:
        direction: which hook.
        ifindexes: every device by name, if they were read before: the C library takes 10 µs a device.
        qdiscs: as `tc.clsact_devices`, if they were read just now.

    Raises:
        KernelError: netlink or bpf(2) refused; without CAP_SYS_ADMIN programs cannot be opened by id.
    """
    state, names = tc.observe_our_place(direction, qdiscs), _Names()
    ifindexes = tc.ifindexes() if ifindexes is None else ifindexes
    by_index = {index: name for name, index in ifindexes.items()}
    hook = preferred_hook()
    return Attachments(
        hook=hook,
        ifindexes=ifindexes,
        attached=_observe(hook, direction, state, by_index, names),
        clsact=frozenset(by_index[index] for index in state.clsact if index in by_index),
    )


def _observe(
    hook: Hook, direction: Direction, state: tc.TcState, by_index: Mapping[int, str], names: _Names
) -> Attached:
    filters: dict[str, list[int]] = {}
    conflicts: list[tuple[str, str]] = []
    for found in state.filters:
        ifname = by_index.get(found.ifindex)
        if ifname is None:  # made after the list of names was read
            continue
        if found.is_ours:
            filters[ifname] = [found.program_id]
        elif found.is_our_place:
            conflicts.append((ifname, f"{found.kind} filter {found.name or hex(found.handle)}"))
    chains: dict[str, list[int]] = {}
    ahead: list[tuple[str, str]] = []
    if tcx.is_supported():
        for ifname, chain in zip(by_index.values(), tcx.chains(by_index, direction), strict=True):
            if not chain:
                continue
            ours = _ours(chain, direction, names)
            if ours:
                chains[ifname] = ours
                before = chain[: chain.index(ours[0])]
                ahead += [(ifname, names.of(other) or str(other)) for other in before]
    filtered = _filtered(filters, chains) if hook is Hook.TCX else frozenset()
    wanted, others = (chains, filters) if hook is Hook.TCX else (filters, chains)
    wanted = wanted | {ifname: filters[ifname] for ifname in filtered}
    others = {ifname: found for ifname, found in others.items() if ifname not in filtered}
    return Attached(
        programs={ifname: found[0] for ifname, found in (others | wanted).items()},
        ids=frozenset(number for found in (*wanted.values(), *others.values()) for number in found),
        surplus=frozenset(others) | {ifname for ifname, found in wanted.items() if len(found) > 1},
        conflicts=tuple(sorted(conflicts)) if hook is Hook.CLSACT else (),
        ahead=tuple(sorted(ahead)),
        filtered=filtered,
        taken=frozenset(ifname for ifname, _ in conflicts) if hook is Hook.TCX else frozenset(),
    )


def _filtered(filters: Mapping[str, list[int]], chains: Mapping[str, list[int]]) -> frozenset[str]:
    """Few filters are of a version that knew no tcx, and give way to it; many were attached by `attach_all`.

    The last few of many are told by those that moved already. Who has the same program in both ways is in the middle
    of its move, at this moment or since a crash.
    """
    if max(len(filters), len(chains)) < FEW_DEVICES:
        return frozenset()
    return frozenset(ifname for ifname, found in filters.items() if chains.get(ifname, found) == found)


def _ours(chain: tuple[int, ...], direction: Direction, names: _Names) -> list[int]:
    return [program_id for program_id in chain if names.of(program_id) == PROGRAM_NAMES[direction]]


def attach(program_fd: int, ifname: str, direction: Direction = Direction.INGRESS) -> None:
    """Attach at a hook of a device, or replace our older program there in one step.

    An older one that is attached in the other way goes after the new one is there.

    Raises:
        ConflictError: someone else's filter is in our place.
        KernelError: the kernel refused.
    """
    if preferred_hook() is Hook.CLSACT:
        tc.attach_filter(ifname, program_fd, direction)
        _detach_tcx([ifname], direction)
        return
    _attach_tcx(program_fd, ifname, direction)
    tc.detach_filters([ifname], direction)


def attach_all(
    program_fd: int,
    ifnames: Sequence[str],
    filtered: frozenset[str],
    direction: Direction = Direction.INGRESS,
) -> None:
    """Attach at a hook of several devices; see `attach`.

    Args:
        program_fd: the program.
        ifnames: the devices.
        filtered: those that get a filter although there is tcx.
        direction: the hook.

    Raises:
        ConflictError: someone else's filter is in our place.
        KernelError: the kernel refused; other devices may have the program already.
    """
    is_tcx = preferred_hook() is Hook.TCX
    together = [name for name in ifnames if name in filtered or not is_tcx]
    if not is_tcx and len(together) < MANY_DEVICES:
        together = []
    others = set(ifnames) - set(together)
    for name in ifnames:
        if name in others:
            attach(program_fd, name, direction)
    tc.attach_filters(together, program_fd, direction)
    _detach_tcx(together, direction)


def move_to_tcx(ifname: str, direction: Direction = Direction.INGRESS) -> bool:
    """Attach by tcx what our filter of a device runs, then remove the filter; its qdisc stays (`_kept_clsact`).

    At every moment one of the two is there. The kernel holds the lock of all network configuration for a grace period.

    Returns:
        whether there was a filter of ours, and now is none; not where another program of ours is attached as well.

    Raises:
        KernelError: the kernel refused; where the filter could not be removed, both are there.
    """
    index = tc.indexes_of([ifname])[ifname]
    program_id = tc.our_program(index, direction)
    if program_id is None:
        return False
    ours = _ours(tcx.programs(index, direction), direction, _Names())
    if not ours:
        with libbpf.program_fd_by_id(program_id) as program:
            reached(f"attach the {direction} program to {ifname}")
            tcx.attach(index, direction, program.number)
    elif ours != [program_id]:
        return False
    tc.detach_filters([ifname], direction)
    return True


def _attach_tcx(program_fd: int, ifname: str, direction: Direction) -> None:
    try:
        index = socket.if_nametoindex(ifname)
    except OSError as error:
        operation = f"attach the eBPF program to {ifname}"
        raise KernelError(operation, f"there is no device {ifname}", errno=errno.ENODEV) from error
    ours = _ours(tcx.programs(index, direction), direction, _Names())
    with libbpf.OwnedFd(os.dup(program_fd)) as program:
        wanted = libbpf.program_info(program).program_id
    reached(f"attach the {direction} program to {ifname}")
    if wanted in ours:
        ours.remove(wanted)
    elif ours:
        with libbpf.program_fd_by_id(ours.pop(0)) as old:
            tcx.replace(index, direction, program_fd, old.number)
    else:
        tcx.attach(index, direction, program_fd)
    _remove(index, direction, ours)


def _detach_tcx(ifnames: Sequence[str], direction: Direction) -> bool:
    """Whether any of ours was there; a device that is gone is none."""
    if not ifnames or not tcx.is_supported():
        return False
    names, was_there = _Names(), False
    for ifname in ifnames:
        try:
            index = socket.if_nametoindex(ifname)
        except OSError:
            continue
        ours = _ours(tcx.programs(index, direction), direction, names)
        if ours:
            reached(f"detach the {direction} program from {ifname}")
        _remove(index, direction, ours)
        was_there |= bool(ours)
    return was_there


def _remove(ifindex: int, direction: Direction, program_ids: list[int]) -> None:
    for program_id in program_ids:
        try:
            program = libbpf.program_fd_by_id(program_id)
        except KernelError as error:
            if error.errno != errno.ENOENT:  # gone by itself
                raise
            continue
        with program:
            tcx.detach(ifindex, direction, program.number)


def detach(*ifnames: str, direction: Direction = Direction.INGRESS) -> bool:
    """Take our program from a hook of devices, however it is attached; nothing of others.

    Args:
        ifnames: the devices; one that is gone is no error.
        direction: the hook.

    Returns:
        whether our program was anywhere there.

    Raises:
        KernelError: the kernel refused; other devices may be without it already.
    """
    was_there = _detach_tcx(ifnames, direction)
    return bool(tc.detach_filters(ifnames, direction)) or was_there
