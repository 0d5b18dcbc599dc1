# SPDX-License-Identifier: Apache-2.0
"""Waiting for the programs that are running at this moment."""

from __future__ import annotations

import ctypes
from typing import Final

from datapath.kernel.bpf import libbpf, objects

_ARRAY: Final = 2
_ARRAY_OF_MAPS: Final = 12
_SHAPE: Final = (4, 4, 1, 0)


def wait_for_programs() -> None:
    """Return when every program has ended that was running when this was called: 5 to 20 ms.

    An update of a map of maps promises that (since 4.20): who changes one must know when the old map is out of use.

    Raises:
        KernelError: the kernel refused.
    """
    with (
        objects.create_map("dp_grace_inner", (_ARRAY, *_SHAPE)) as inner,
        objects.create_map("dp_grace", (_ARRAY_OF_MAPS, *_SHAPE), inner=inner) as outer,
    ):
        number = ctypes.c_uint32(inner.number)
        result = libbpf.library().bpf_map_update_elem(
            outer.number, bytes(4), ctypes.byref(number), ctypes.c_uint64(libbpf.BPF_ANY)
        )
        libbpf.check("wait for the running eBPF programs", result)
