# SPDX-License-Identifier: Apache-2.0
"""A loaded ingress program with its maps: filled, compared, updated in place, counted."""

from __future__ import annotations

import ctypes
import errno
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from datapath.errors import KernelError
from datapath.kernel.bpf import abi, libbpf
from datapath.kernel.bpf.encoding import (
    Elements,
    decode_networks,
    decode_prefixes,
    encode_networks,
    encode_prefixes,
)
from datapath.kernel.bpf.source import Capacities
from datapath.kernel.bpf.tables import IngressTables, PrefixTable
from datapath.plan.ingress import Verdict
from datapath.points import reached

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType

_META_KEY: Final = bytes(4)
_BYTE_ORDER: Final = sys.byteorder


@dataclass(frozen=True, slots=True)
class Counter:
    """Packets and bytes; segments that GRO merged count one by one, with one set of headers."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Counter) -> Counter:
        """Both together."""
        return Counter(packets=self.packets + other.packets, bytes=self.bytes + other.bytes)


#: Per slot and verdict; verdicts that never happened are there with zeros.
SlotCounters = dict[int, dict[Verdict, Counter]]


@dataclass(frozen=True, slots=True)
class ProgramMeta:
    """What a loaded program says of itself.

    Attributes:
        digest: of the compiled text; compare with `desired_digest(fwmark_mask, capacities)`.
    """

    abi_version: int
    fwmark_mask: int
    capacities: Capacities
    digest: bytes


@dataclass(frozen=True, slots=True)
class _Change:
    """What separates one map from its desired contents."""

    bpf_map: libbpf.Map
    added: Elements
    removed: list[bytes]

    @classmethod
    def between(cls, bpf_map: libbpf.Map, actual: Elements, desired: Elements) -> _Change:
        return cls(
            bpf_map=bpf_map,
            added={key: value for key, value in desired.items() if actual.get(key) != value},
            removed=[key for key in actual if key not in desired],
        )

    def add(self) -> None:
        self.bpf_map.update(self.added)

    def remove(self) -> None:
        self.bpf_map.delete(self.removed)


class LoadedIngress:
    """An open program, loaded by us or found attached. A context manager; closing does not detach.

    Attributes:
        program_id: the kernel's id of the program.
    """

    def __init__(self, program: libbpf.OwnedFd, maps: Iterable[libbpf.Map]) -> None:
        self._program = program
        self._maps = {bpf_map.name: bpf_map for bpf_map in maps}
        self.program_id: int = libbpf.program_info(program).program_id

    @classmethod
    def open(cls, program_id: int) -> LoadedIngress:
        """Open a program that someone, perhaps an earlier process of ours, has loaded.

        Raises:
            KernelError: there is none of that id, it is not ours, or it has another set of maps.
        """
        program = libbpf.program_fd_by_id(program_id)
        maps: list[libbpf.Map] = []
        try:
            info = libbpf.program_info(program)
            maps.extend(libbpf.Map.by_id(map_id) for map_id in info.map_ids)
            names = {bpf_map.name for bpf_map in maps}
            if info.name == abi.PROGRAM_NAME and names >= set(abi.MAP_NAMES):
                return cls(program, maps)
        except BaseException:
            _close(program, maps)
            raise
        _close(program, maps)
        raise KernelError(f"open bpf program {program_id}", "it is not ours, or of another version")

    def close(self) -> None:
        """Close all descriptors. A program that is attached nowhere ends with that."""
        _close(self._program, self._maps.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def program_fd(self) -> int:
        """Descriptor of the program, to attach it."""
        return self._program.number

    def map(self, name: str) -> libbpf.Map:
        """One of `abi.MAP_NAMES`."""
        return self._maps[name]

    def bind_maps(self) -> None:
        """Tie the maps that only user space uses to the life of the program."""
        for bpf_map in self._maps.values():
            libbpf.bind_map(self._program, bpf_map)

    # --- what it is

    def read_meta(self) -> ProgramMeta:
        """What the program says of itself."""
        raw = self._maps[abi.MAP_META].lookup(_META_KEY)
        if raw is None or len(raw) < ctypes.sizeof(abi.ProgramMeta):
            raise KernelError(f"read bpf program {self.program_id}", "its description is of another version")
        meta = abi.ProgramMeta.from_buffer_copy(raw)
        return ProgramMeta(
            abi_version=meta.abi_version,
            fwmark_mask=meta.fwmark_mask,
            capacities=Capacities(networks=meta.networks_capacity, counters=meta.counters_capacity),
            digest=bytes(meta.digest),
        )

    def write_meta(self, meta: ProgramMeta) -> None:
        """Label the program; done once, before it is attached."""
        raw = abi.ProgramMeta(
            abi_version=meta.abi_version,
            fwmark_mask=meta.fwmark_mask,
            networks_capacity=meta.capacities.networks,
            counters_capacity=meta.capacities.counters,
            digest=(ctypes.c_uint8 * 32)(*meta.digest),
        )
        self._maps[abi.MAP_META].update({_META_KEY: bytes(raw)})

    # --- what it knows

    def read_tables(self) -> IngressTables:
        """The maps' contents, decoded."""
        return IngressTables(
            networks=decode_networks(self._maps[abi.MAP_NETWORKS].items()),
            prefixes={
                table: decode_prefixes({version: self._trie(table, version).items() for version in (4, 6)})
                for table in PrefixTable
            },
        )

    def _trie(self, table: PrefixTable, version: int) -> libbpf.Map:
        return self._maps[abi.PREFIX_MAPS[table.value, version]]

    def write_tables(self, desired: IngressTables) -> bool:
        """Make the maps hold exactly `desired`, touching only elements that differ; add before delete.

        Prefixes are added before the networks that ask for them and removed after them: a new network is never
        checked against half of its lists. A change of one network's rules is not atomic as a whole; where
        that matters, load a new program and switch.

        Returns:
            whether anything differed.

        Raises:
            KernelError: a map is full or the kernel refused; elements already written stay.
        """
        actual = self.read_tables()
        if actual == desired:
            return False
        self._clear_counters(desired.slots - actual.slots)
        changes = [self._prefix_changes(table, actual, desired) for table in PrefixTable]
        changes_by_map = [change for by_version in changes for change in by_version]
        networks = _Change.between(
            self._maps[abi.MAP_NETWORKS], encode_networks(actual.networks), encode_networks(desired.networks)
        )
        for change in (*changes_by_map, networks):
            reached("add entries to a map of the eBPF program")
            change.add()
        for change in (networks, *changes_by_map):
            reached("remove entries from a map of the eBPF program")
            change.remove()
        return True

    def _prefix_changes(
        self, table: PrefixTable, actual: IngressTables, desired: IngressTables
    ) -> list[_Change]:
        before = encode_prefixes(actual.prefixes[table])
        after = encode_prefixes(desired.prefixes[table])
        return [
            _Change.between(self._trie(table, version), before[version], after[version]) for version in (4, 6)
        ]

    # --- what it saw

    def _clear_counters(self, slots: Iterable[int]) -> None:
        # A slot that a network takes over must not start with the counts of its former owner.
        keys = [slot.to_bytes(4, _BYTE_ORDER) for slot in sorted(slots)]
        for name in (abi.MAP_COUNTERS, abi.MAP_CARRIED):
            bpf_map = self._maps[name]
            stale = [key for key in keys if any(bpf_map.lookup(key) or b"")]
            bpf_map.update(dict.fromkeys(stale, bytes(bpf_map.stored_size)))

    def read_counters(self) -> SlotCounters:
        """Counts of all slots that ever saw a packet, with those of the programs that this one replaced."""
        totals: SlotCounters = {}
        for name in (abi.MAP_COUNTERS, abi.MAP_CARRIED):
            for key, raw in self._maps[name].items().items():
                if any(raw):
                    slot = int.from_bytes(key, _BYTE_ORDER)
                    totals[slot] = add_counters(totals.get(slot), _decode_counters(raw))
        return totals

    def read_slot(self, slot: int) -> dict[Verdict, Counter]:
        """What this program alone counted for one slot.

        Raises:
            KernelError: the program has no such slot.
        """
        raw = self._maps[abi.MAP_COUNTERS].lookup(slot.to_bytes(4, _BYTE_ORDER))
        if raw is None:
            raise KernelError(
                f"read the counters of slot {slot}", "the program has no such slot", errno=errno.ENOENT
            )
        return _decode_counters(raw)

    def carry_counters(self, counters: Mapping[int, Mapping[Verdict, Counter]]) -> None:
        """Set what `read_counters` adds to this program's own counts: the totals of its predecessor.

        To be called before the switch, so that readers never see a drop to zero, and once more after it, when
        the predecessor sees no more packets.
        """
        carried = self._maps[abi.MAP_CARRIED]
        slots = self.read_tables().slots
        carried.update(
            {
                slot.to_bytes(4, _BYTE_ORDER): _encode_counters(by_verdict)
                for slot, by_verdict in counters.items()
                if slot in slots and slot < carried.max_entries
            }
        )

    def test_run(self, data: bytes, *, context: bytes = b"", repeat: int = 1) -> libbpf.TestRun:
        """Run the program on a made-up packet (BPF_PROG_TEST_RUN)."""
        return libbpf.program_test_run(self._program, data, context=context, repeat=repeat)


def _close(program: libbpf.OwnedFd, maps: Iterable[libbpf.Map]) -> None:
    for bpf_map in maps:
        bpf_map.close()
    program.close()


def _decode_counters(raw: bytes) -> dict[Verdict, Counter]:
    """One value, or those of all CPUs added up."""
    numbers = memoryview(raw).cast("Q")
    stride = 2 * len(Verdict)
    return {
        verdict: Counter(
            packets=sum(numbers[2 * verdict :: stride]), bytes=sum(numbers[2 * verdict + 1 :: stride])
        )
        for verdict in Verdict
    }


def add_counters(
    left: Mapping[Verdict, Counter] | None, right: Mapping[Verdict, Counter]
) -> dict[Verdict, Counter]:
    """Both together, verdict by verdict."""
    return {verdict: (left[verdict] if left else Counter()) + right[verdict] for verdict in Verdict}


def _encode_counters(by_verdict: Mapping[Verdict, Counter]) -> bytes:
    raw = abi.NetworkCounters()
    for verdict, counter in by_verdict.items():
        raw.verdicts[verdict].packets = counter.packets
        raw.verdicts[verdict].bytes = counter.bytes
    return bytes(raw)
