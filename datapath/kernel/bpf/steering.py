# SPDX-License-Identifier: Apache-2.0
"""The egress program of `steering: direct`: observe, load, fill, attach.

It has maps of its own, apart from the ingress program's: either can be replaced or be missing without the other.

A change has two halves, because answers of flows that both policies serve must find their way all the time: first
everything new is added, and after the rest of the change what is no longer wanted is removed.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from datapath.errors import KernelError
from datapath.kernel import tc
from datapath.kernel.bpf import abi, attachments, grace, source, steering_index
from datapath.kernel.bpf.ingress import require_ethernet
from datapath.kernel.bpf.loaded import Change, Counter, LoadedProgram
from datapath.kernel.bpf.source import Capacities
from datapath.kernel.bpf.steering_index import Index
from datapath.kernel.bpf.steering_tables import (
    SteeringTables,
    decode_replies,
    decode_targets,
    encode_replies,
    encode_targets,
    resolve_steering,
)
from datapath.plan.tc import Direction, Hook
from datapath.points import reached

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from datapath.kernel.bpf.encoding import Elements
    from datapath.kernel.bpf.tables import SlotPrefix
    from datapath.plan.steering import SteeringProgram

_BYTE_ORDER: Final = sys.byteorder
_VERSIONS: Final = (4, 6)
_INDEX_KEY: Final = bytes(4)


class LoadedSteering(LoadedProgram):
    """The egress program, loaded by us or found attached."""

    name = abi.STEERING_NAME
    map_names = abi.STEERING_MAP_NAMES
    counter_names = (abi.MAP_STEERED, abi.MAP_STEERED_BEFORE)

    def read_tables(self) -> SteeringTables:
        """The maps' contents, decoded."""
        replies, targets = self._read(abi.REPLY_MAPS), self._read(abi.TARGET_MAPS)
        decoded = decode_targets(targets)
        is_indexed = self._read_index() == self._index_over(replies, decoded)
        return SteeringTables(decode_replies(replies), decoded, is_indexed)

    def _read(self, names: Mapping[int, str]) -> dict[int, Elements]:
        return {version: self._maps[name].items() for version, name in names.items()}

    def _index_over(self, replies: Mapping[int, Elements], targets: Iterable[SlotPrefix]) -> Index:
        sizes = {version: self._maps[abi.INDEX_MAPS[version]].max_entries for version in _VERSIONS}
        return steering_index.build(replies, targets, sizes)

    def _read_index(self) -> Index:
        buckets = {}
        for version in _VERSIONS:
            bpf_map = self._maps[abi.INDEX_MAPS[version]]
            empty = bytes(bpf_map.stored_size)
            buckets[version] = {key: raw for key, raw in bpf_map.items().items() if raw != empty}
        return Index(self._maps[abi.MAP_INDEX].lookup(_INDEX_KEY) or b"", buckets)

    def _stop_index(self, how: bytes) -> None:
        """Let the tries be asked, and nothing but them by the time this returns."""
        reached("stop the index of the egress program")
        self._maps[abi.MAP_INDEX].update({_INDEX_KEY: how})
        grace.wait_for_programs()

    def _start_index(self, index: Index, actual: Index) -> None:
        """It is stopped; nobody looks into it before all of it is written."""
        for version in _VERSIONS:
            bpf_map = self._maps[abi.INDEX_MAPS[version]]
            empty = bytes(bpf_map.stored_size)
            cleared = dict.fromkeys(set(actual.buckets[version]) - set(index.buckets[version]), empty)
            bpf_map.update({**cleared, **index.buckets[version]})
        self._stop_index(index.stopped)
        reached("start the index of the egress program")
        self._maps[abi.MAP_INDEX].update({_INDEX_KEY: index.how})

    def write_tables(self, desired: SteeringTables, *, only_add: bool = False) -> None:
        """Make the maps hold `desired`, element by element; each is written whole.

        Destinations come before the VIPs whose answers they concern, and go after them. The index over both is
        stopped meanwhile if it has to change.

        Args:
            desired: the contents.
            only_add: leave what is not desired.

        Raises:
            KernelError: the kernel refused; elements already written stay.
        """
        old, before = self._read(abi.REPLY_MAPS), self._read(abi.TARGET_MAPS)
        actual = SteeringTables(decode_replies(old), decode_targets(before))
        self.clear_counters(desired.slots - actual.slots)
        if only_add:
            desired = desired.joined(actual)
        new, after = encode_replies(desired.replies), encode_targets(desired.targets)
        targets, replies = (
            [Change.between(self._maps[names[v]], left[v], right[v]) for v in _VERSIONS]
            for names, left, right in ((abi.TARGET_MAPS, before, after), (abi.REPLY_MAPS, old, new))
        )
        index, present = self._index_over(new, desired.targets), self._read_index()
        if index != present and present.how != present.stopped:
            self._stop_index(present.stopped)
        for change in (*targets, *replies):
            reached("add entries to a map of the egress program")
            change.add()
        if not only_add:
            for change in (*replies, *targets):
                reached("remove entries from a map of the egress program")
                change.remove()
        if index != present:
            self._start_index(index, present)

    def read_counters(self) -> dict[int, Counter]:
        """Steered packets of all slots that ever saw one, with those of the programs that this one replaced."""
        totals: dict[int, Counter] = {}
        for name in self.counter_names:
            for key, raw in self._maps[name].items().items():
                if any(raw):
                    slot, numbers = int.from_bytes(key, _BYTE_ORDER), memoryview(raw).cast("Q")
                    counter = Counter(packets=sum(numbers[::2]), bytes=sum(numbers[1::2]))
                    totals[slot] = totals.get(slot, Counter()) + counter
        return totals

    def carry_counters(self, counters: Mapping[int, Counter]) -> None:
        """Set what `read_counters` adds to this program's own counts: the totals of its predecessor."""
        carried = self._maps[abi.MAP_STEERED_BEFORE]
        slots = self.read_tables().slots
        carried.update(
            {
                _slot_key(slot): bytes(abi.Counter(packets=counter.packets, bytes=counter.bytes))
                for slot, counter in counters.items()
                if slot in slots
            }
        )


def _slot_key(slot: int) -> bytes:
    return slot.to_bytes(4, _BYTE_ORDER)


@dataclass(frozen=True, slots=True)
class SteeringState:
    """What is at the egress of all devices of the namespace; the fields are those of `IngressState`.

    Attributes:
        tables: of our attached programs by id; one that cannot be read is missing.
        capacities: of the same programs.
        digests: of the same programs.
    """

    ifindexes: Mapping[str, int]
    attached: Mapping[str, int]
    tables: Mapping[int, SteeringTables]
    capacities: Mapping[int, Capacities]
    digests: Mapping[int, bytes]
    conflicts: tuple[tuple[str, str], ...] = ()
    clsact: frozenset[str] = frozenset()
    hook: Hook = Hook.CLSACT
    surplus: frozenset[str] = frozenset()
    ahead: tuple[tuple[str, str], ...] = ()

    @property
    def all_tables(self) -> SteeringTables:
        """What any of our programs knows."""
        joined = SteeringTables()
        for program_id in sorted(self.tables):
            joined = self.tables[program_id].joined(joined)
        return joined


@dataclass(frozen=True, slots=True)
class SteeringDiff:
    """What separates actual from desired.

    Attributes:
        reload: a new program must be loaded and attached to all of `attach`; the reason, or empty.
        program_id: the one that stays, where none is to be loaded.
        additions: its maps lack something.
        removals: its maps hold something that is not desired.
        attach: devices that need the program (with `reload`: all of them), or to be rid of a surplus one.
        detach: devices that carry our program and should not.
    """

    reload: str = ""
    program_id: int | None = None
    additions: bool = False
    removals: bool = False
    attach: tuple[str, ...] = ()
    detach: tuple[str, ...] = ()


def observe_steering(
    ifindexes: Mapping[str, int] | None = None, qdiscs: frozenset[int] | None = None
) -> SteeringState:
    """Everything about our egress programs, read from the kernel only.

    Args:
        ifindexes: every device by name, if they were read before.
        qdiscs: as `tc.clsact_devices`, if they were read just now.

    Raises:
        KernelError: netlink or bpf(2) refused; without CAP_SYS_ADMIN programs cannot be opened by id.
    """
    state = attachments.observe_attachments(Direction.EGRESS, ifindexes, qdiscs)
    found = state.attached
    programs = {
        program_id: program
        for program_id in sorted(found.ids)
        if (program := LoadedSteering.read(program_id, LoadedSteering.read_tables)) is not None
    }
    return SteeringState(
        ifindexes=state.ifindexes,
        attached=found.programs,
        tables={program_id: tables for program_id, (_, tables) in programs.items()},
        capacities={program_id: meta.capacities for program_id, (meta, _) in programs.items()},
        digests={program_id: meta.digest for program_id, (meta, _) in programs.items()},
        conflicts=found.conflicts,
        clsact=state.clsact,
        hook=state.hook,
        surplus=found.surplus,
        ahead=found.ahead,
    )


def compare_steering(desired: SteeringProgram, actual: SteeringState) -> SteeringDiff:
    """What is to be done; an empty diff means that the kernel does what the plan says.

    Raises:
        KernelError: a desired device does not exist (ENODEV).
    """
    tables, wanted = resolve_steering(desired, actual.ifindexes), desired.attachments
    for ifname in wanted:
        if ifname not in actual.ifindexes:
            raise KernelError(
                "find the devices of the egress program", f"there is no device {ifname}", errno=errno.ENODEV
            )
    detach = tuple(sorted({*actual.attached, *actual.surplus} - set(wanted)))
    if not wanted:
        return SteeringDiff(detach=detach)
    ids = {actual.attached[name] for name in wanted if name in actual.attached}
    reason = _reload_reason(tables, actual, ids)
    if reason:
        return SteeringDiff(reload=reason, attach=wanted, detach=detach)
    (kept,) = ids
    present = actual.tables[kept]
    changed = {vip for vip, way in tables.replies.items() if present.replies.get(vip) != way}
    return SteeringDiff(
        program_id=kept,
        additions=bool(changed or tables.targets - present.targets or not present.is_indexed),
        removals=bool(set(present.replies) - set(tables.replies) or present.targets - tables.targets),
        attach=tuple(name for name in wanted if name not in actual.attached or name in actual.surplus),
        detach=detach,
    )


def _reload_reason(tables: SteeringTables, actual: SteeringState, ids: set[int]) -> str:
    """Why no attached program can be kept; empty if the only one can."""
    if len(ids) != 1:
        return "several programs are attached" if ids else "nothing is attached yet"
    (program_id,) = ids
    if program_id not in actual.tables:
        return "the attached program is of a version that cannot be read"
    capacities = actual.capacities[program_id]
    if actual.digests[program_id] != source.desired_digest(0, capacities, entry=source.steering_entry()):
        return "the program's text changed"
    if tables.highest_slot >= capacities.counters:
        return "its maps are too small"
    return ""


def _load(tables: SteeringTables) -> LoadedSteering:
    capacities = Capacities.for_need(networks=0, highest_slot=tables.highest_slot)
    text = source.render(0, capacities, entry=source.steering_entry())
    return LoadedSteering.load(text, capacities, fill=lambda loaded: loaded.write_tables(tables))


def verify_steering(desired: SteeringProgram) -> None:
    """Compile and put through the kernel's verifier; devices need not exist yet.

    Raises:
        KernelError: bcc is missing, the program does not compile, or the kernel refuses it.
    """
    invented = {network.device: number for number, network in enumerate(desired.networks, start=1)}
    _load(resolve_steering(desired, invented)).close()


def load_steering(desired: SteeringProgram, actual: SteeringState) -> LoadedSteering:
    """A complete program aside, which also knows what the present ones do. Close it after attaching.

    Raises:
        KernelError: as `verify_steering`, or a device is missing or is no Ethernet device.
    """
    for ifname in desired.attachments:
        require_ethernet(ifname)
    return _load(resolve_steering(desired, tc.ifindexes()).joined(actual.all_tables))


def switch_steering(loaded: LoadedSteering, actual: SteeringState, devices: tuple[str, ...]) -> None:
    """Attach a new program to all its devices and carry the counters of those that it replaces.

    Raises:
        ConflictError: someone else's filter is in our place on one of the devices.
        KernelError: the kernel refused; devices before it in the order have the new program.
    """
    with contextlib.ExitStack() as opened:
        olds = [
            opened.enter_context(LoadedSteering.open(program_id))
            for program_id in actual.tables
            if program_id != loaded.program_id
        ]
        _carry(loaded, olds)
        for ifname in devices:
            attachments.attach(loaded.program_fd, ifname, Direction.EGRESS)
        _carry(loaded, olds)


def _carry(loaded: LoadedSteering, olds: list[LoadedSteering]) -> None:
    total: dict[int, Counter] = {}
    for old in olds:
        for slot, counter in old.read_counters().items():
            total[slot] = total.get(slot, Counter()) + counter
    loaded.carry_counters(total)
