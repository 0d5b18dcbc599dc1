# SPDX-License-Identifier: Apache-2.0
"""Compiled programs kept as files, for machines where compiling takes minutes: the emulated ones of `make test-vm`.

Off unless the environment names a directory. What lies there is loaded as it is, so it is trusted like
the code itself; an entry is found by everything that the compiler was given, and bcc and the system's headers must be
those that made it (tests/vm compares an entry with what the machine compiles by itself).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from datapath.errors import KernelError
from datapath.kernel.bpf import libbpf

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Names the directory.
ENVIRONMENT: Final = "DATAPATH_BPF_OBJECTS"

_PROG_TYPE_SCHED_CLS: Final = 3
#: struct bpf_insn; the registers share a byte, source in the upper half.
_INSTRUCTION: Final = struct.Struct("=BBhi")
_LOAD_IMM64, _CALL = 0x18, 0x85
_PSEUDO_MAP_FD: Final = 1


class _MapCreateOpts(ctypes.Structure):
    """`struct bpf_map_create_opts` of libbpf."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
        ("btf_vmlinux_value_type_id", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("map_extra", ctypes.c_uint64),
        ("numa_node", ctypes.c_uint32),
        ("map_ifindex", ctypes.c_uint32),
    )


@dataclass(frozen=True, slots=True)
class BpfObject:
    """Instructions and the maps that they use.

    Attributes:
        functions: instructions by name; in place of a map's descriptor stands its position in `maps`.
        maps: by name; type, size of key and value, entries, flags.
    """

    functions: Mapping[str, bytes]
    maps: Mapping[str, tuple[int, int, int, int, int]]

    def dump(self) -> str:
        """JSON, for `parse`."""
        functions = {name: code.hex() for name, code in self.functions.items()}
        return json.dumps({"functions": functions, "maps": dict(self.maps)})

    @classmethod
    def parse(cls, text: str) -> BpfObject:
        """What `dump` wrote."""
        raw: dict[str, dict[str, Any]] = json.loads(text)
        functions = {name: bytes.fromhex(code) for name, code in raw["functions"].items()}
        return cls(functions, {name: tuple(shape) for name, shape in raw["maps"].items()})

    def load(self, wanted: Sequence[str]) -> tuple[list[libbpf.OwnedFd], list[libbpf.OwnedFd]]:
        """Make the maps, load the functions as tc programs.

        Returns:
            the programs, and the maps of these names; both open, in order. The caller closes them.

        Raises:
            KernelError: the kernel refused; it says no more than an errno here.
        """
        maps = {name: create_map(name, shape) for name, shape in self.maps.items()}
        numbers = [bpf_map.number for bpf_map in maps.values()]
        programs = []
        for name, code in self.functions.items():
            real = _with_map_references(code, dict(enumerate(numbers)))
            result = libbpf.library().bpf_prog_load(
                _PROG_TYPE_SCHED_CLS,
                name.encode(),
                b"GPL",
                real,
                ctypes.c_size_t(len(real) // _INSTRUCTION.size),
                None,
            )
            programs.append(libbpf.OwnedFd(libbpf.check(f"load bpf program {name}", result)))
        return programs, [maps[name] for name in wanted]


def create_map(
    name: str, shape: tuple[int, int, int, int, int], *, inner: libbpf.OwnedFd | None = None
) -> libbpf.OwnedFd:
    """A new map of this type, size of key and value, entries and flags.

    Args:
        name: at most 15 characters.
        shape: as in `BpfObject.maps`.
        inner: for a map of maps, one that looks like those to come.

    Raises:
        KernelError: the kernel refused.
    """
    kind, key_size, value_size, entries, flags = shape
    opts = _MapCreateOpts(
        sz=ctypes.sizeof(_MapCreateOpts), map_flags=flags, inner_map_fd=inner.number if inner else 0
    )
    result = libbpf.library().bpf_map_create(
        kind, name.encode(), key_size, value_size, entries, ctypes.byref(opts)
    )
    return libbpf.OwnedFd(libbpf.check(f"create bpf map {name}", result))


def _with_map_references(code: bytes, numbers: Mapping[int, int]) -> bytes:
    """The instructions with every reference to a map renumbered.

    Raises:
        KernelError: they refer to something else than maps.
    """
    changed = bytearray()
    wide = False
    for opcode, registers, offset, value in _INSTRUCTION.iter_unpack(code):
        pseudo, number = registers >> 4, value
        if not wide and opcode == _LOAD_IMM64 and pseudo == _PSEUDO_MAP_FD and value in numbers:
            number = numbers[value]
        elif not wide and opcode in {_LOAD_IMM64, _CALL} and pseudo:
            raise KernelError("keep a bpf program", f"it has a reference of kind {pseudo} to {value}")
        # The second half of a 64-bit constant has opcode 0.
        wide = not wide and opcode == _LOAD_IMM64
        changed += _INSTRUCTION.pack(opcode, registers, offset, number)
    return bytes(changed)


def from_compiler(
    exported: Mapping[str, Mapping[str, Any]],
    programs: Sequence[libbpf.OwnedFd],
    opened: Sequence[libbpf.OwnedFd],
) -> BpfObject:
    """What bcc made, independent of the process that loaded it.

    Args:
        exported: `functions`, instructions in hexadecimal with the compiler process's map descriptors, and `maps`,
            those descriptors by name.
        programs: the same functions, loaded: what their maps are is read from the kernel.
        opened: further maps, which only user space uses.

    Raises:
        KernelError: the instructions refer to something else than these maps.
    """
    shapes = dict(_shape(libbpf.Map(fd)) for fd in opened)
    for program in programs:
        for map_id in libbpf.program_info(program).map_ids:
            with contextlib.closing(libbpf.Map.by_id(map_id)) as bpf_map:
                shapes |= [_shape(bpf_map)]
    shapes = dict(sorted(shapes.items()))
    positions = {exported["maps"][name]: position for position, name in enumerate(shapes)}
    functions = {
        name: _with_map_references(bytes.fromhex(code), positions)
        for name, code in exported["functions"].items()
    }
    return BpfObject(functions, shapes)


def _shape(bpf_map: libbpf.Map) -> tuple[str, tuple[int, int, int, int, int]]:
    shape = (bpf_map.type, bpf_map.key_size, bpf_map.value_size, bpf_map.max_entries, bpf_map.flags)
    return bpf_map.name, shape


def directory() -> Path | None:
    """Where objects are kept, None where nobody wants that."""
    name = os.environ.get(ENVIRONMENT)
    return Path(name) if name else None


def entry(folder: Path, request: str) -> Path:
    """The file of one request to the compiler."""
    return folder / f"{hashlib.sha256(request.encode()).hexdigest()}.json"


def read(path: Path) -> BpfObject | None:
    """A kept object, None where there is none."""
    try:
        return BpfObject.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def keep(path: Path, kept: BpfObject) -> None:
    """Write an object, whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(kept.dump(), encoding="utf-8")
    scratch.replace(path)
