# SPDX-License-Identifier: Apache-2.0
"""A loaded program with its maps, whichever it is: opened by id, described, tied to its maps."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final, Self, TypeVar

from datapath.errors import EbpfError, KernelError
from datapath.kernel.bpf import abi, compiler, libbpf
from datapath.kernel.bpf.source import Capacities

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from datapath.kernel.bpf.encoding import Elements
    from datapath.kernel.bpf.source import Source

_META_KEY: Final = bytes(4)
_Verified = TypeVar("_Verified")
_Contents = TypeVar("_Contents")


@dataclass(frozen=True, slots=True)
class Counter:
    """Packets and bytes; segments that GRO merged count one by one, with one set of headers."""

    packets: int = 0
    bytes: int = 0

    def __add__(self, other: Counter) -> Counter:
        """Both together."""
        return Counter(packets=self.packets + other.packets, bytes=self.bytes + other.bytes)


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
class Change:
    """What separates one map from its desired contents."""

    bpf_map: libbpf.Map
    added: Elements
    removed: list[bytes]

    @classmethod
    def between(cls, bpf_map: libbpf.Map, actual: Elements, desired: Elements) -> Change:
        return cls(
            bpf_map=bpf_map,
            added={key: value for key, value in desired.items() if actual.get(key) != value},
            removed=[key for key in actual if key not in desired],
        )

    def add(self) -> None:
        self.bpf_map.update(self.added)

    def remove(self) -> None:
        self.bpf_map.delete(self.removed)


class LoadedProgram:
    """An open program, loaded by us or found attached. A context manager; closing does not detach.

    Attributes:
        name: of the program in the kernel; ours is what is called so and has the maps.
        map_names: the maps that user space asks for.
        counter_names: those of them that count by slot: by itself, and before it for this one's predecessors.
        program_id: the kernel's id of the program.
    """

    name: ClassVar[str]
    map_names: ClassVar[tuple[str, ...]]
    counter_names: ClassVar[tuple[str, ...]]

    def __init__(self, program: libbpf.OwnedFd, maps: Iterable[libbpf.Map]) -> None:
        self._program = program
        self._maps = {bpf_map.name: bpf_map for bpf_map in maps}
        self.program_id: int = libbpf.program_info(program).program_id

    @classmethod
    def load(
        cls, text: Source, capacities: Capacities, *, fwmark_mask: int = 0, fill: Callable[[Self], object]
    ) -> Self:
        """Compile, load, label and fill a program aside. Nothing is attached.

        Args:
            text: with a function of this class's name, and its maps.
            capacities: that the text was rendered with.
            fwmark_mask: likewise.
            fill: writes the tables.

        Raises:
            KernelError: bcc is missing, the text does not compile, or the kernel refuses it.
        """
        programs, maps = compiler.compile_and_load(text, functions=[cls.name], maps=cls.map_names)
        with contextlib.ExitStack() as cleanup:
            for fd in (*programs, *maps):
                cleanup.callback(fd.close)
            loaded = cls(programs[0], [libbpf.Map(fd) for fd in maps])
            loaded.bind_maps()
            loaded.write_meta(
                ProgramMeta(
                    abi_version=abi.ABI_VERSION,
                    fwmark_mask=fwmark_mask,
                    capacities=capacities,
                    digest=text.digest,
                )
            )
            fill(loaded)
            cleanup.pop_all()
        return loaded

    @classmethod
    def open(cls, program_id: int) -> Self:
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
            if info.name == cls.name and names >= set(cls.map_names):
                return cls(program, maps)
        except BaseException:
            _close(program, maps)
            raise
        _close(program, maps)
        raise KernelError(f"open bpf program {program_id}", "it is not ours, or of another version")

    @classmethod
    def read(
        cls, program_id: int, contents: Callable[[Self], _Contents]
    ) -> tuple[ProgramMeta, _Contents] | None:
        """What a program says of itself, and what it holds; None where this version cannot read it: it is replaced.

        Args:
            program_id: as for `open`.
            contents: reads its maps.

        Raises:
            KernelError: this process may not look (EPERM): "unreadable" would be a lie.
        """
        try:
            with cls.open(program_id) as loaded:
                meta = loaded.read_meta()
                return (meta, contents(loaded)) if meta.abi_version == abi.ABI_VERSION else None
        except KernelError as error:
            if error.errno == errno.EPERM:
                raise
            return None

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
        """One of `map_names`."""
        return self._maps[name]

    def bind_maps(self) -> None:
        """Tie the maps that only user space uses to the life of the program."""
        for bpf_map in self._maps.values():
            libbpf.bind_map(self._program, bpf_map)

    def clear_counters(self, slots: Iterable[int]) -> None:
        """A slot that a network takes over must not start with the counts of its former owner."""
        keys = [slot.to_bytes(4, sys.byteorder) for slot in sorted(slots)]
        for name in self.counter_names:
            bpf_map = self._maps[name]
            stale = [key for key in keys if any(bpf_map.lookup(key) or b"")]
            bpf_map.update(dict.fromkeys(stale, bytes(bpf_map.stored_size)))

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

    def test_run(self, data: bytes, *, context: bytes = b"", repeat: int = 1) -> libbpf.TestRun:
        """Run the program on a made-up packet (BPF_PROG_TEST_RUN)."""
        return libbpf.program_test_run(self._program, data, context=context, repeat=repeat)


def _close(program: libbpf.OwnedFd, maps: Iterable[libbpf.Map]) -> None:
    for bpf_map in maps:
        bpf_map.close()
    program.close()


def verify_if_needed(why_reload: Callable[[], str], verify: Callable[[], _Verified]) -> _Verified | None:
    """Put a program through the verifier if it would have to be loaded.

    Args:
        why_reload: compares desired and actual; empty where an attached program can stay.
        verify: compiles and loads.

    Raises:
        EbpfError: it does not compile, or the kernel refuses it.
    """
    try:
        if not why_reload():
            return None
    except KernelError as error:
        # A VLAN device that the same change will make first.
        if error.errno != errno.ENODEV:
            raise
    try:
        return verify()
    except KernelError as error:
        raise EbpfError(error.operation, error.reason, errno=error.errno, hint=error.hint) from error
