# SPDX-License-Identifier: Apache-2.0
"""tcx: programs attached to a device without a qdisc (Linux 6.6).

BPF_PROG_ATTACH, not a link: an attachment without one outlives the process, needs no bpffs to be pinned in, and is
replaced in one step, as a filter is. What that costs: any program may be detached by whoever may call bpf(2), and no
event tells of it.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from collections.abc import Iterable, Iterator
from typing import Final

from datapath.kernel.bpf import libbpf
from datapath.plan.tc import Direction

#: BPF_TCX_INGRESS and BPF_TCX_EGRESS of linux/bpf.h; Debian 12's headers are too old for them.
_ATTACH_TYPES: Final = {Direction.INGRESS: 46, Direction.EGRESS: 47}
_F_REPLACE, _F_BEFORE = 1 << 2, 1 << 3
#: BPF_MPROG_MAX: the kernel has no room for more at one hook.
_PROGRAMS_MAX: Final = 64
#: Loopback is in every namespace.
_LOOPBACK: Final = 1


class _AttachOpts(ctypes.Structure):
    """`struct bpf_prog_attach_opts` of libbpf 1.0."""

    _fields_ = (("sz", ctypes.c_size_t), ("flags", ctypes.c_uint), ("replace_prog_fd", ctypes.c_int))


@functools.cache
def is_supported() -> bool:
    """Whether this kernel has tcx; asked once, with a query that changes nothing.

    Raises:
        KernelError: without CAP_NET_ADMIN nobody can tell.
    """
    result = _Query(Direction.INGRESS).ask(_LOOPBACK)
    if result == -errno.EINVAL:
        return False
    libbpf.check("look for tcx", result)
    return True


def programs(ifindex: int, direction: Direction) -> tuple[int, ...]:
    """Ids of the programs of a device, in the order in which they run; nothing where the device is gone.

    Raises:
        KernelError: the kernel refused.
    """
    (found,) = chains([ifindex], direction)
    return found


def chains(ifindexes: Iterable[int], direction: Direction) -> Iterator[tuple[int, ...]]:
    """`programs` of each of these devices.

    Raises:
        KernelError: the kernel refused.
    """
    query = _Query(direction)
    for ifindex in ifindexes:
        result = query.ask(ifindex)
        if result and result != -errno.ENODEV:
            libbpf.check(f"list the tcx programs of ifindex {ifindex}", result)
        yield () if result else query.found()


class _Query:
    """One question for device after device: to make room for each answer would take longer than to ask."""

    def __init__(self, direction: Direction) -> None:
        self._ids = (ctypes.c_uint32 * _PROGRAMS_MAX)()
        self._count, flags = ctypes.c_uint32(), ctypes.c_uint32()
        self._places = (
            _ATTACH_TYPES[direction],
            0,
            ctypes.byref(flags),
            self._ids,
            ctypes.byref(self._count),
        )
        self._function = libbpf.library().bpf_prog_query

    def ask(self, ifindex: int) -> int:
        """0, or a negative errno."""
        self._count.value = _PROGRAMS_MAX
        return int(self._function(ifindex, *self._places))

    def found(self) -> tuple[int, ...]:
        """The ids of the last answer."""
        count = self._count.value
        return tuple(self._ids[:count]) if count else ()


def attach(ifindex: int, direction: Direction, program_fd: int) -> None:
    """Put the program before all others: one that answers TC_ACT_OK or redirects ends the chain.

    Raises:
        KernelError: the device is gone, 64 programs are there already (ERANGE), or the kernel refused.
    """
    _attach(ifindex, direction, program_fd, _AttachOpts(flags=_F_BEFORE))


def replace(ifindex: int, direction: Direction, program_fd: int, old_fd: int) -> None:
    """Put the program in the place of another, in one step.

    Raises:
        KernelError: the old one is not there (any more), or the kernel refused.
    """
    _attach(ifindex, direction, program_fd, _AttachOpts(flags=_F_REPLACE, replace_prog_fd=old_fd))


def _attach(ifindex: int, direction: Direction, program_fd: int, opts: _AttachOpts) -> None:
    opts.sz = ctypes.sizeof(opts)
    result = libbpf.library().bpf_prog_attach_opts(
        program_fd, ifindex, _ATTACH_TYPES[direction], ctypes.byref(opts)
    )
    libbpf.check(f"attach a tcx program at {direction} of ifindex {ifindex}", result)


def detach(ifindex: int, direction: Direction, program_fd: int) -> None:
    """Take this one program away; one that is not there (any more) is no error.

    Raises:
        KernelError: the kernel refused.
    """
    result = libbpf.library().bpf_prog_detach2(program_fd, ifindex, _ATTACH_TYPES[direction])
    if result not in {-errno.ENOENT, -errno.ENODEV}:
        libbpf.check(f"detach a tcx program from {direction} of ifindex {ifindex}", result)
