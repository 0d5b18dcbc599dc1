# SPDX-License-Identifier: Apache-2.0
"""eBPF objects that are left in the kernel, found by their ids: attached or not, until nobody holds them.

Ids are global, and other tests load programs meanwhile. So only those count whose description carries one mark mask.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

from datapath.errors import KernelError
from datapath.kernel.bpf import abi, libbpf


def objects_with_mask(fwmark_mask: int) -> dict[str, int]:
    """How many programs and maps there are whose description says this mask: a program and its maps, or maps alone."""
    programs, maps, descriptions = 0, set[int](), 0
    for map_id in _ids("bpf_map_get_next_id"):
        if _mask_of(map_id) == fwmark_mask:
            descriptions += 1
            maps.add(map_id)
    for program_id in _ids("bpf_prog_get_next_id"):
        try:
            with libbpf.program_fd_by_id(program_id) as program:
                held = set(libbpf.program_info(program).map_ids)
        except KernelError:  # somebody else's, and gone meanwhile
            continue
        if held & maps:
            programs += 1
            maps |= held
    return {"programs": programs, "maps": len(maps), "descriptions": descriptions}


def _ids(function: str) -> Iterator[int]:
    found = ctypes.c_uint32(0)
    while getattr(libbpf.library(), function)(found.value, ctypes.byref(found)) == 0:
        yield found.value


def _mask_of(map_id: int) -> int | None:
    try:
        found = libbpf.Map.by_id(map_id)
    except KernelError:
        return None
    try:
        raw = found.lookup(bytes(4)) if found.name == abi.MAP_META else None
    finally:
        found.close()
    whole = raw is not None and len(raw) >= ctypes.sizeof(abi.ProgramMeta)
    return abi.ProgramMeta.from_buffer_copy(raw).fwmark_mask if raw is not None and whole else None
