# SPDX-License-Identifier: Apache-2.0
"""The loaded program as a function of a packet."""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from datapath.kernel.bpf import LoadedIngress, abi, compiler, libbpf, source

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.kernel.bpf import Counter, IngressTables
    from datapath.plan.ingress import Verdict
    from tests.bpf.packets import Tag

TC_ACT_UNSPEC = -1
TC_ACT_SHOT = 2

_ENTRY = Path(__file__).with_name("entry.bpf.c")
_CONTEXT_SIZE = 180
# Offsets in struct __sk_buff, which is UAPI: they never change.
# What BPF_PROG_TEST_RUN insists on since Linux 6.18.
_SHORTEST_PAYLOAD = {0x0800: 20, 0x86DD: 40}
_UNUSED_ETHERTYPE = b"\x88\xb5"
_MARK, _IFINDEX, _CB, _GSO_SEGS = 8, 40, 48, 164


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the program did with a packet."""

    action: int
    mark: int


class Harness:
    """A loaded test program; run packets through it."""

    def __init__(self, loaded: LoadedIngress) -> None:
        self.loaded = loaded

    def run(
        self,
        data: bytes,
        *,
        ifindex: int = 1,
        mark: int = 0,
        metadata_tag: Tag | None = None,
        gso_segs: int = 0,
    ) -> Outcome:
        """One packet in, as if it came in on that device with that tag already taken off by the driver."""
        context = bytearray(_CONTEXT_SIZE)
        struct.pack_into("=I", context, _MARK, mark)
        struct.pack_into("=I", context, _IFINDEX, ifindex)
        (ethertype,) = struct.unpack_from("!H", data, 12)
        is_refused = len(data) < 14 + _SHORTEST_PAYLOAD.get(ethertype, 0)
        if is_refused:
            data = data[:12] + _UNUSED_ETHERTYPE + data[14:]
        struct.pack_into("=III", context, _CB, *(metadata_tag or (0, 0)), ethertype if is_refused else 0)
        struct.pack_into("=I", context, _GSO_SEGS, gso_segs)
        result = self.loaded.test_run(data, context=bytes(context))
        (mark_after,) = struct.unpack_from("=I", result.context, _MARK)
        return Outcome(action=result.return_value, mark=mark_after)

    def counts(self, slot: int) -> dict[Verdict, Counter]:
        """The slot's counters."""
        return self.loaded.read_slot(slot)


@contextlib.contextmanager
def harness(fwmark_mask: int, tables: IngressTables) -> Iterator[Harness]:
    """Compile and load the test program with these tables."""
    text = source.render(fwmark_mask, tables.need, entry=_ENTRY)
    programs, maps = compiler.compile_and_load(text, functions=["datapath_test"], maps=abi.MAP_NAMES)
    with LoadedIngress(programs[0], [libbpf.Map(fd) for fd in maps]) as loaded:
        loaded.write_tables(tables)
        yield Harness(loaded)
