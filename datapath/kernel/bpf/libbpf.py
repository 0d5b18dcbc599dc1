# SPDX-License-Identifier: Apache-2.0
"""The few bpf(2) operations that we need, by ctypes on libbpf: it is small, and bcc's library lacks most.

libbpf 1.x returns -errno from every low-level call; `check` makes a `KernelError` of it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from datapath.errors import KernelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from types import TracebackType

_ENOENT: Final = 2
_BATCH: Final = 4096
_PERCPU_TYPES: Final = frozenset({5, 6, 10})  # PERCPU_HASH, PERCPU_ARRAY, LRU_PERCPU_HASH of linux/bpf.h

#: `flags` of map updates (linux/bpf.h).
BPF_ANY: Final = 0
BPF_NOEXIST: Final = 1


class _ProgInfo(ctypes.Structure):
    """The first part of `struct bpf_prog_info`; the kernel fills as much as we ask for."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("jited_prog_len", ctypes.c_uint32),
        ("xlated_prog_len", ctypes.c_uint32),
        ("jited_prog_insns", ctypes.c_uint64),
        ("xlated_prog_insns", ctypes.c_uint64),
        ("load_time", ctypes.c_uint64),
        ("created_by_uid", ctypes.c_uint32),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
    )


class _MapInfo(ctypes.Structure):
    """The first part of `struct bpf_map_info`."""

    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
    )


class RunOpts(ctypes.Structure):
    """`struct bpf_test_run_opts` of libbpf."""

    _fields_ = (
        ("sz", ctypes.c_size_t),
        ("data_in", ctypes.c_void_p),
        ("data_out", ctypes.c_void_p),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_void_p),
        ("ctx_out", ctypes.c_void_p),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("repeat", ctypes.c_int),
        ("duration", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The library itself; every call returns -errno, for `check`.

    Raises:
        KernelError: it is not installed.
    """
    try:
        return ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise KernelError("load libbpf.so.1", str(error), hint="install the package libbpf1") from error


def check(operation: str, result: int) -> int:
    """The result of a libbpf call, unless it is an error.

    Raises:
        KernelError: it is one.
    """
    if result < 0:
        raise KernelError(operation, os.strerror(-result), errno=-result, hint=_hint(-result))
    return result


def _hint(errno: int) -> str:
    if errno == 1:
        return "bpf(2) needs root (CAP_BPF and CAP_NET_ADMIN, CAP_SYS_ADMIN to find objects by id)"
    return ""


@functools.cache
def possible_cpus() -> int:
    """How many values a per-CPU map has for each key."""
    return check("count the possible CPUs", int(library().libbpf_num_possible_cpus()))


class OwnedFd:
    """A file descriptor that is closed exactly once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def number(self) -> int:
        """The descriptor.

        Raises:
            ValueError: it was closed.
        """
        if self._fd < 0:
            raise ValueError("file descriptor is closed")
        return self._fd

    def close(self) -> None:
        """Close it; again does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class ProgramInfo:
    """What the kernel says of a loaded program."""

    program_id: int
    name: str
    tag: str
    map_ids: tuple[int, ...]


def program_fd_by_id(program_id: int) -> OwnedFd:
    """Open a loaded program.

    Raises:
        KernelError: `errno` 2 if there is none of that id.
    """
    return OwnedFd(check(f"open bpf program {program_id}", library().bpf_prog_get_fd_by_id(program_id)))


def program_ids() -> Iterator[int]:
    """All loaded programs of the machine, in ascending order."""
    number = ctypes.c_uint32()
    while True:
        result = library().bpf_prog_get_next_id(number, ctypes.byref(number))
        if result == -_ENOENT:
            return
        check("list bpf programs", result)
        yield number.value


def program_info(program: OwnedFd) -> ProgramInfo:
    """Name, id and maps of an open program."""
    ids = (ctypes.c_uint32 * 64)()
    info = _ProgInfo(nr_map_ids=len(ids), map_ids=ctypes.addressof(ids))
    size = ctypes.c_uint32(ctypes.sizeof(info))
    result = library().bpf_obj_get_info_by_fd(program.number, ctypes.byref(info), ctypes.byref(size))
    check("read the info of a bpf program", result)
    return ProgramInfo(
        program_id=info.id,
        name=info.name.decode(),
        tag=bytes(info.tag).hex(),
        map_ids=tuple(ids[: min(info.nr_map_ids, len(ids))]),
    )


def bind_map(program: OwnedFd, bpf_map: Map) -> None:
    """Keep a map that the code does not use alive with the program, and findable through it (Linux 5.10)."""
    result = library().bpf_prog_bind_map(program.number, bpf_map.fd.number, None)
    check(f"bind map {bpf_map.name} to the bpf program", result)


def _batches(count: int) -> Iterable[slice]:
    for start in range(0, count, _BATCH):
        yield slice(start, min(start + _BATCH, count))


class Map:
    """One open map; keys and values are bytes of exactly the kernel's sizes.

    Attributes:
        stored_size: bytes of one value as the kernel exchanges it: all CPUs of a per-CPU map.
    """

    def __init__(self, fd: OwnedFd) -> None:
        self.fd = fd
        info = _MapInfo()
        size = ctypes.c_uint32(ctypes.sizeof(info))
        result = library().bpf_obj_get_info_by_fd(fd.number, ctypes.byref(info), ctypes.byref(size))
        check("read the info of a bpf map", result)
        self.map_id: int = info.id
        self.type: int = info.type
        self.flags: int = info.map_flags
        self.name: str = info.name.decode()
        self.key_size: int = info.key_size
        self.value_size: int = info.value_size
        self.max_entries: int = info.max_entries
        self.stored_size = self.value_size
        if info.type in _PERCPU_TYPES:
            self.stored_size = -(-self.value_size // 8) * 8 * possible_cpus()

    @classmethod
    def by_id(cls, map_id: int) -> Map:
        """Open a map of a loaded program."""
        return cls(OwnedFd(check(f"open bpf map {map_id}", library().bpf_map_get_fd_by_id(map_id))))

    def close(self) -> None:
        """Close the descriptor; the map lives on while a program uses it."""
        self.fd.close()

    def _sized(self, *, key: bytes | None = None, value: bytes | None = None) -> None:
        if key is not None and len(key) != self.key_size:
            raise ValueError(f"{self.name}: key of {len(key)} bytes, the map has {self.key_size}")
        if value is not None and len(value) != self.stored_size:
            raise ValueError(f"{self.name}: value of {len(value)} bytes, the map has {self.stored_size}")

    def lookup(self, key: bytes) -> bytes | None:
        """The value, or None."""
        self._sized(key=key)
        value = ctypes.create_string_buffer(self.stored_size)
        result = library().bpf_map_lookup_elem(self.fd.number, key, value)
        if result == -_ENOENT:
            return None
        check(f"read map {self.name}", result)
        return value.raw

    def update(self, items: Mapping[bytes, bytes]) -> None:
        """Set these elements, each one atomically; others stay.

        Raises:
            KernelError: `errno` 7 when a hash map is full. Elements before the failing one are set.
        """
        for key, value in items.items():
            self._sized(key=key, value=value)
        keys = list(items)

        def run(part: slice, count: ctypes.c_uint32) -> int:
            chunk = keys[part]
            return int(
                library().bpf_map_update_batch(
                    self.fd.number,
                    b"".join(chunk),
                    b"".join(items[key] for key in chunk),
                    ctypes.byref(count),
                    None,
                )
            )

        self._batched("write", keys, run)

    def delete(self, keys: Sequence[bytes]) -> None:
        """Remove these elements.

        Raises:
            KernelError: `errno` 2 if one is absent. Those before it are gone.
        """
        for key in keys:
            self._sized(key=key)

        def run(part: slice, count: ctypes.c_uint32) -> int:
            return int(
                library().bpf_map_delete_batch(
                    self.fd.number, b"".join(keys[part]), ctypes.byref(count), None
                )
            )

        self._batched("delete from", keys, run)

    def _batched(
        self, verb: str, keys: Sequence[bytes], run: Callable[[slice, ctypes.c_uint32], int]
    ) -> None:
        for part in _batches(len(keys)):
            count = ctypes.c_uint32(part.stop - part.start)
            check(f"{verb} map {self.name}", run(part, count))

    def items(self) -> dict[bytes, bytes]:
        """Every element, by batches."""
        # A batch never splits a hash bucket (ENOSPC if one does not fit): room for all of a small map, and
        # for any bucket of a large one.
        room = min(self.max_entries, _BATCH)
        keys = ctypes.create_string_buffer(room * self.key_size)
        values = ctypes.create_string_buffer(room * self.stored_size)
        position = ctypes.create_string_buffer(max(self.key_size, 8))
        found: dict[bytes, bytes] = {}
        first = True
        while True:
            count = ctypes.c_uint32(room)
            result = library().bpf_map_lookup_batch(
                self.fd.number,
                None if first else position,
                position,
                keys,
                values,
                ctypes.byref(count),
                None,
            )
            if result not in {0, -_ENOENT}:
                check(f"list map {self.name}", result)
            # Each `raw` copies the whole buffer.
            every_key, every_value = keys.raw, values.raw
            for index in range(count.value):
                key = every_key[index * self.key_size : (index + 1) * self.key_size]
                found[key] = every_value[index * self.stored_size : (index + 1) * self.stored_size]
            if result == -_ENOENT or len(found) > self.max_entries or count.value == 0:
                return found
            first = False


@dataclass(frozen=True, slots=True)
class TestRun:
    """Outcome of one run of a program on a made-up packet."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    return_value: int
    data: bytes
    context: bytes
    duration_ns: int


def _address(data: bytes) -> int | None:
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value


def program_test_run(program: OwnedFd, data: bytes, *, context: bytes = b"", repeat: int = 1) -> TestRun:
    """Run a loaded program with BPF_PROG_TEST_RUN.

    Args:
        program: a loaded program.
        data: the frame from its Ethernet header on, at least 14 bytes.
        context: a `struct __sk_buff`, or nothing. Kernels refuse fields that they cannot set (vlan_tci).
        repeat: how often; for measuring `duration_ns`, which is the mean.

    Raises:
        KernelError: the kernel refused the input.
    """
    data_out = ctypes.create_string_buffer(len(data) + 64)
    context_out = ctypes.create_string_buffer(max(len(context), 256))
    opts = RunOpts(
        sz=ctypes.sizeof(RunOpts),
        data_in=_address(data),
        data_size_in=len(data),
        data_out=ctypes.cast(data_out, ctypes.c_void_p),
        data_size_out=len(data_out),
        ctx_in=_address(context) if context else None,
        ctx_size_in=len(context),
        ctx_out=ctypes.cast(context_out, ctypes.c_void_p) if context else None,
        ctx_size_out=len(context_out) if context else 0,
        repeat=repeat,
    )
    check("run a bpf program", library().bpf_prog_test_run_opts(program.number, ctypes.byref(opts)))
    return TestRun(
        return_value=ctypes.c_int32(opts.retval).value,
        data=data_out.raw[: opts.data_size_out],
        context=context_out.raw[: opts.ctx_size_out],
        duration_ns=opts.duration,
    )
