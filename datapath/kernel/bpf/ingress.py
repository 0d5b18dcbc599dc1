# SPDX-License-Identifier: Apache-2.0
"""The ingress program as the controller sees it: observe, load, attach, update, detach.

Ours is told from the kernel alone: where and how it is attached (`attachments.py`), the program's name, and
the description that the program carries in its `dp_meta` map.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from datapath.errors import KernelError
from datapath.kernel import tc
from datapath.kernel.bpf import attachments, source
from datapath.kernel.bpf.image import Image, image_of
from datapath.kernel.bpf.loaded import ProgramMeta
from datapath.kernel.bpf.program import LoadedIngress, SlotCounters, add_counters
from datapath.plan.tc import Direction, Hook

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from datapath.plan.ingress import IngressProgram

_SIOCGIFHWADDR: Final = 0x8927
#: linux/if_arp.h: device types whose packets begin with an Ethernet header.
_ETHERNET_TYPES: Final = frozenset({1, 772})


@dataclass(frozen=True, slots=True)
class ActualProgram:
    """One of our programs that is attached somewhere, as read back."""

    program_id: int
    meta: ProgramMeta
    image: Image

    @property
    def is_current(self) -> bool:
        """Whether compiling now would give the same program: then its maps may be updated in place."""
        return self.meta.digest == source.desired_digest(self.meta.fwmark_mask, self.meta.capacities)


@dataclass(frozen=True, slots=True)
class IngressState:
    """What is at the ingress of all devices of the namespace.

    Attributes:
        ifindexes: every device by name.
        attached: program id by name of the device.
        programs: our attached programs by id. One that is attached but missing here is of a version that
            cannot be read: replace it.
        conflicts: device and description of each filter of someone else in our place.
        clsact: devices that have a clsact (or ingress) qdisc, whoever made it.
        surplus: devices where one more program of ours is attached, or one in another way than `hook`.
        ahead: device and name of each program of someone else that sees packets before ours (tcx only).
        filtered: devices that have a filter although there is tcx, and keep it.
        taken: devices where a filter of someone else leaves no place for ours (tcx only).
    """

    ifindexes: Mapping[str, int]
    attached: Mapping[str, int]
    programs: Mapping[int, ActualProgram]
    conflicts: tuple[tuple[str, str], ...] = ()
    clsact: frozenset[str] = frozenset()
    hook: Hook = Hook.CLSACT
    surplus: frozenset[str] = frozenset()
    ahead: tuple[tuple[str, str], ...] = ()
    filtered: frozenset[str] = frozenset()
    taken: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class IngressDiff:
    """What separates actual from desired, in the order in which it is to be done.

    Attributes:
        reload: a new program must be loaded and attached to all of `attach`; the reason, or empty.
        update: the program to update in place with `update_entries`, if its tables differ.
        attach: devices that need the program (with `reload`: all of them), or to be rid of a surplus one.
        detach: devices that carry our program and should not.
    """

    reload: str = ""
    update: int | None = None
    attach: tuple[str, ...] = ()
    detach: tuple[str, ...] = ()
    conflicts: tuple[tuple[str, str], ...] = field(default=())

    @property
    def is_empty(self) -> bool:
        """Whether nothing is to be done."""
        return not (self.reload or self.update or self.attach or self.detach or self.conflicts)


def _read_program(program_id: int) -> ActualProgram | None:
    found = LoadedIngress.read(program_id, LoadedIngress.read_image)
    return ActualProgram(program_id, *found) if found else None


def observe_ingress(
    ifindexes: Mapping[str, int] | None = None, qdiscs: frozenset[int] | None = None
) -> IngressState:
    """Everything about our ingress programs, read from the kernel only.

    Args:
        ifindexes: every device by name, if they were read before.
        qdiscs: as `tc.clsact_devices`, if they were read just now.

    Raises:
        KernelError: netlink or bpf(2) refused; without CAP_SYS_ADMIN programs cannot be opened by id.
    """
    state = attachments.observe_attachments(Direction.INGRESS, ifindexes, qdiscs)
    found = state.attached
    programs = {program_id: _read_program(program_id) for program_id in sorted(found.ids)}
    return IngressState(
        ifindexes=state.ifindexes,
        attached=found.programs,
        programs={program_id: program for program_id, program in programs.items() if program is not None},
        conflicts=found.conflicts,
        clsact=state.clsact,
        hook=state.hook,
        surplus=found.surplus,
        ahead=found.ahead,
        filtered=found.filtered,
        taken=found.taken,
    )


def _reload_reason(desired: IngressProgram, image: Image, programs: list[ActualProgram | None]) -> str:
    """Why no attached program can be kept; empty if the only one can."""
    if len(programs) != 1:
        return "several programs are attached" if programs else "nothing is attached yet"
    (program,) = programs
    if program is None:
        return "the attached program is of a version that cannot be read"
    if program.meta.fwmark_mask != desired.fwmark_mask:
        return f"the fwmark mask changes from {program.meta.fwmark_mask:#x}"
    if not program.is_current:
        return "the program's text changed"
    # Entries are added before others are removed, so both must fit for a moment.
    together = len(program.image.networks.keys() | image.networks.keys())
    if not program.meta.capacities.holds(image.need) or together > program.meta.capacities.networks:
        return "its maps are too small"
    return ""


def compare_ingress(desired: IngressProgram, actual: IngressState) -> IngressDiff:
    """What is to be done; an empty diff means that the kernel does what the plan says.

    Raises:
        KernelError: a desired device does not exist (ENODEV).
    """
    image = image_of(desired, actual.ifindexes)
    wanted = desired.attachments
    everywhere = frozenset(wanted)
    conflicts = tuple(conflict for conflict in actual.conflicts if conflict[0] in everywhere)
    detach = tuple(sorted({*actual.attached, *actual.surplus} - everywhere))
    if not wanted:
        return IngressDiff(detach=detach)
    programs = [
        actual.programs.get(program_id)
        for program_id in sorted({actual.attached[name] for name in wanted if name in actual.attached})
    ]
    reason = _reload_reason(desired, image, programs)
    if reason:
        return IngressDiff(reload=reason, attach=wanted, detach=detach, conflicts=conflicts)
    kept = next(program for program in programs if program is not None)
    return IngressDiff(
        update=kept.program_id if kept.image != image else None,
        attach=tuple(name for name in wanted if name not in actual.attached or name in actual.surplus),
        detach=detach,
        conflicts=conflicts,
    )


def _load(fwmark_mask: int, image: Image) -> LoadedIngress:
    capacities = image.need
    text = source.render(fwmark_mask, capacities)
    return LoadedIngress.load(
        text, capacities, fwmark_mask=fwmark_mask, fill=lambda loaded: loaded.write_image(image)
    )


def load_ingress(desired: IngressProgram, verified: LoadedIngress | None = None) -> LoadedIngress:
    """Compile, load and fill a complete program aside. Nothing is attached; close it after attaching.

    Args:
        desired: what it must know.
        verified: from `verify_ingress`; taken instead of compiling again if it is the right one, else closed.

    Raises:
        KernelError: a device is missing or is no Ethernet device, bcc is missing, the program does not
            compile, or the kernel refuses it.
    """
    require_ethernet(*desired.attachments)
    image = image_of(desired, tc.ifindexes())
    if verified is not None:
        if verified.read_meta().digest == source.desired_digest(desired.fwmark_mask, image.need):
            written = verified.read_image()
            if written != image:
                # Emptied first: entries of the check and the real ones together may not fit.
                verified.write_image(Image(), written)
                verified.write_image(image, Image())
            return verified
        verified.close()
    return _load(desired.fwmark_mask, image)


def verify_ingress(desired: IngressProgram) -> LoadedIngress:
    """Compile and put through the kernel's verifier; devices need not exist yet. Close it, or load with it.

    Raises:
        KernelError: as `load_ingress`.
    """
    known = tc.ifindexes()
    names = {name for net in desired.networks for name in (net.point.ifname, net.device)}
    missing = sorted(names - known.keys())
    invented = {name: number for number, name in enumerate(missing, start=max(known.values(), default=0) + 1)}
    return _load(desired.fwmark_mask, image_of(desired, known | invented))


def require_ethernet(*ifnames: str) -> None:
    """The program reads an Ethernet header first: on a tunnel without one it would misread every packet."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for ifname in ifnames:
            request = struct.pack("16sH14x", ifname.encode(), 0)
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFHWADDR, request)
            except OSError as error:
                raise KernelError(
                    f"look at device {ifname}", error.strerror or str(error), errno=error.errno or 0
                ) from error
            (kind,) = struct.unpack_from("H", answer, 16)
            if kind not in _ETHERNET_TYPES:
                raise KernelError(
                    f"attach the eBPF program to {ifname}",
                    f"it is not an Ethernet device (ARPHRD type {kind})",
                    hint="use backend: nft for networks on tunnels",
                )


def attach(loaded: LoadedIngress, ifname: str) -> None:
    """Attach at the ingress of a device; see `attachments.attach`."""
    attachments.attach(loaded.program_fd, ifname)


def attach_all(loaded: LoadedIngress, ifnames: Sequence[str], filtered: frozenset[str] = frozenset()) -> None:
    """Attach at the ingress of devices; see `attachments.attach_all`."""
    attachments.attach_all(loaded.program_fd, ifnames, filtered)


def detach(*ifnames: str) -> bool:
    """Take our program from the ingress of devices; see `attachments.detach`."""
    return attachments.detach(*ifnames)


def update_entries(program_id: int, desired: IngressProgram, actual: IngressState | None = None) -> bool:
    """Bring the maps of an attached program to the desired state, element by element; see `write_image`.

    Args:
        program_id: of the program.
        desired: what it must know.
        actual: as observed just now; it is not read again then.

    Returns:
        whether anything differed.

    Raises:
        KernelError: the program is gone, a device does not exist, or a map is full.
    """
    image = image_of(desired, actual.ifindexes if actual else tc.ifindexes())
    with LoadedIngress.open(program_id) as loaded:
        return loaded.write_image(image, actual.programs[program_id].image if actual else None)


def read_counters(program_id: int) -> SlotCounters:
    """Counts of an attached program by slot and verdict.

    Raises:
        KernelError: the program is gone.
    """
    with LoadedIngress.open(program_id) as loaded:
        return loaded.read_counters()


def switch(
    loaded: LoadedIngress,
    actual: IngressState,
    attachments: tuple[str, ...],
    filtered: frozenset[str] = frozenset(),
) -> None:
    """Attach a new program to all its devices and carry the counters of the one it replaces.

    Each device switches in one step and at no time has none. Where it stops with an error, the devices before
    have the new program, the rest the old one; running again completes it.

    Raises:
        ConflictError: someone else's filter is in our place on one of the devices.
        KernelError: the kernel refused.
    """
    with contextlib.ExitStack() as opened:
        olds = [
            opened.enter_context(LoadedIngress.open(program_id))
            for program_id in actual.programs
            if program_id != loaded.program_id
        ]
        _carry(loaded, olds)
        attach_all(loaded, attachments, filtered)
        _carry(loaded, olds)


def _carry(loaded: LoadedIngress, olds: list[LoadedIngress]) -> None:
    total: SlotCounters = {}
    for old in olds:
        for slot, by_verdict in old.read_counters().items():
            total[slot] = add_counters(total.get(slot), by_verdict)
    loaded.carry_counters(total)
