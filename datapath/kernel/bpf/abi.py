# SPDX-License-Identifier: Apache-2.0
"""Python's side of `bpf/abi.h`: the same layouts and constants, and the assertions that keep them equal.

`assertions()` is appended to every text that is compiled: a constant, size or offset that differs is a
compile error, so a program whose maps Python would misread cannot be loaded.
"""

from __future__ import annotations

import ctypes
from typing import Final

from datapath.plan.ingress import OtherCheck, Verdict, VipCheck

ABI_VERSION: Final = 1
SLOT_NONE: Final = 0
PROGRAM_NAME: Final = "datapath_in"

#: Map names as the kernel reports them (at most 15 characters).
MAP_NETWORKS: Final = "dp_networks"
MAP_COUNTERS: Final = "dp_counters"
MAP_CARRIED: Final = "dp_carried"
MAP_META: Final = "dp_meta"
MAP_NAMES: Final = (MAP_NETWORKS, MAP_COUNTERS, MAP_CARRIED, MAP_META)

VIP_CHECK_CODES: Final = {VipCheck.OFF: 0, VipCheck.FEASIBLE: 1, VipCheck.STRICT: 2}
OTHER_CHECK_CODES: Final = {OtherCheck.OFF: 0, OtherCheck.LOOSE: 1, OtherCheck.STRICT: 2}


class NetworkKey(ctypes.Structure):
    """`struct network_key`."""

    _fields_ = (("ifindex", ctypes.c_uint32), ("vlan_proto", ctypes.c_uint16), ("vlan_id", ctypes.c_uint16))


class Network(ctypes.Structure):
    """`struct network`."""

    _fields_ = (
        ("fwmark", ctypes.c_uint32),
        ("device_ifindex", ctypes.c_uint32),
        ("slot", ctypes.c_uint16),
        ("vip_check", ctypes.c_uint8),
        ("other_check", ctypes.c_uint8),
        ("check_martians", ctypes.c_uint8),
        ("check_sources", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 2),
    )


class Counter(ctypes.Structure):
    """`struct counter`."""

    _fields_ = (("packets", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


class NetworkCounters(ctypes.Structure):
    """`struct network_counters`."""

    _fields_ = (("verdicts", Counter * len(Verdict)),)


class ProgramMeta(ctypes.Structure):
    """`struct program_meta`."""

    _fields_ = (
        ("abi_version", ctypes.c_uint32),
        ("fwmark_mask", ctypes.c_uint32),
        ("networks_capacity", ctypes.c_uint32),
        ("counters_capacity", ctypes.c_uint32),
        ("digest", ctypes.c_uint8 * 32),
    )


STRUCTS: Final[dict[str, type[ctypes.Structure]]] = {
    "network_key": NetworkKey,
    "network": Network,
    "counter": Counter,
    "network_counters": NetworkCounters,
    "program_meta": ProgramMeta,
}


def constants() -> dict[str, int]:
    """Every constant that both sides use, by its name in C."""
    return {
        "ABI_VERSION": ABI_VERSION,
        "SLOT_NONE": SLOT_NONE,
        "VERDICT_COUNT": len(Verdict),
        **{f"VERDICT_{verdict.name}": int(verdict) for verdict in Verdict},
        **{f"VIP_CHECK_{check.name}": code for check, code in VIP_CHECK_CODES.items()},
        **{f"OTHER_CHECK_{check.name}": code for check, code in OTHER_CHECK_CODES.items()},
    }


def assertions() -> str:
    """C text that compiles only where `bpf/abi.h` and this module agree."""
    lines = []
    for name, value in constants().items():
        lines.append(f'_Static_assert({name} == {value}, "{name} is {value} in abi.py");')
    for name, layout in STRUCTS.items():
        size = ctypes.sizeof(layout)
        lines.append(f'_Static_assert(sizeof(struct {name}) == {size}, "struct {name}: abi.py has {size}");')
        for field, *_ in layout._fields_:
            position = getattr(layout, field)
            where = f"struct {name}.{field}"
            lines.append(
                f"_Static_assert(__builtin_offsetof(struct {name}, {field}) == {position.offset} && "
                f"sizeof(((struct {name} *)0)->{field}) == {position.size}, "
                f'"{where}: abi.py has offset {position.offset}, size {position.size}");'
            )
    return "\n".join(lines) + "\n"
