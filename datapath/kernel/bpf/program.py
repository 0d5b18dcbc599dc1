# SPDX-License-Identifier: Apache-2.0
"""A loaded ingress program with its maps: filled, compared, updated in place, counted."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING, Final

from datapath.errors import KernelError
from datapath.kernel.bpf import abi, libbpf
from datapath.kernel.bpf.encoding import decode_networks, decode_prefixes
from datapath.kernel.bpf.image import TRIES, Image
from datapath.kernel.bpf.loaded import Change, Counter, LoadedProgram
from datapath.kernel.bpf.tables import IngressTables, PrefixTable
from datapath.plan.ingress import Verdict
from datapath.points import reached

if TYPE_CHECKING:
    from collections.abc import Mapping

_BYTE_ORDER: Final = sys.byteorder


#: Per slot and verdict; verdicts that never happened are there with zeros.
SlotCounters = dict[int, dict[Verdict, Counter]]


class LoadedIngress(LoadedProgram):
    """The ingress program, loaded by us or found attached."""

    name = abi.PROGRAM_NAME
    map_names = abi.MAP_NAMES
    counter_names = (abi.MAP_COUNTERS, abi.MAP_CARRIED)

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

    def read_image(self) -> Image:
        """The maps' contents as they are."""
        return Image(
            self._maps[abi.MAP_NETWORKS].items(), {trie: self._trie(*trie).items() for trie in TRIES}
        )

    def write_tables(self, desired: IngressTables) -> bool:
        """As `write_image`."""
        return self.write_image(Image.of(desired))

    def write_image(self, desired: Image, actual: Image | None = None) -> bool:
        """Make the maps hold exactly `desired`, touching only elements that differ; add before delete.

        Prefixes are added before the networks that ask for them and removed after them: a new network is never
        checked against half of its lists. A change of one network's rules is not atomic as a whole; where
        that matters, load a new program and switch.

        Args:
            desired: the contents.
            actual: what `read_image` said just now, if it was asked.

        Returns:
            whether anything differed.

        Raises:
            KernelError: a map is full or the kernel refused; elements already written stay.
        """
        actual = actual or self.read_image()
        if actual == desired:
            return False
        self.clear_counters(desired.slots - actual.slots)
        prefixes = [
            Change.between(self._trie(*trie), actual.prefixes[trie], desired.prefixes[trie]) for trie in TRIES
        ]
        networks = Change.between(self._maps[abi.MAP_NETWORKS], actual.networks, desired.networks)
        for change in (*prefixes, networks):
            reached("add entries to a map of the eBPF program")
            change.add()
        for change in (networks, *prefixes):
            reached("remove entries from a map of the eBPF program")
            change.remove()
        return True

    # --- what it saw

    def read_counters(self) -> SlotCounters:
        """Counts of all slots that ever saw a packet, with those of the programs that this one replaced."""
        totals: SlotCounters = {}
        for name in self.counter_names:
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
        if not counters:
            return
        carried = self._maps[abi.MAP_CARRIED]
        slots = self.read_image().slots
        carried.update(
            {
                slot.to_bytes(4, _BYTE_ORDER): _encode_counters(by_verdict)
                for slot, by_verdict in counters.items()
                if slot in slots and slot < carried.max_entries
            }
        )


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
