# SPDX-License-Identifier: Apache-2.0
"""Python's side of `bpf/abi.h`: the same layouts and constants, and the assertions that keep them equal.

`assertions()` is appended to every text that is compiled: a constant, size or offset that differs is a
compile error, so a program whose maps Python would misread cannot be loaded.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Final

from datapath.plan.ingress import OtherCheck, SourceAction, Verdict, VipCheck

ABI_VERSION: Final = 6
SLOT_NONE: Final = 0
VLAN_PROTO_GUARD: Final = 0xFFFF
SLOT_BITS: Final = 32
PROGRAM_NAME: Final = "datapath_in"

#: Map names as the kernel reports them (at most 15 characters).
MAP_NETWORKS: Final = "dp_networks"
MAP_COUNTERS: Final = "dp_counters"
MAP_CARRIED: Final = "dp_carried"
MAP_META: Final = "dp_meta"
MAP_DROP_CONTROL: Final = "dp_drop_control"
MAP_DROPS: Final = "dp_drops"
#: Tries by question and IP version.
PREFIX_MAPS: Final = {
    (table, version): f"dp_{table}{version}"
    for table in ("common", "sources", "vips", "feasible")
    for version in (4, 6)
}
MAP_NAMES: Final = (
    MAP_NETWORKS,
    MAP_COUNTERS,
    MAP_CARRIED,
    MAP_META,
    MAP_DROP_CONTROL,
    MAP_DROPS,
    *PREFIX_MAPS.values(),
)
STEERING_NAME: Final = "datapath_out"
MAP_STEERED: Final = "dp_steered"
MAP_STEERED_BEFORE: Final = "dp_steered_was"
#: Tries by IP version.
REPLY_MAPS: Final = {4: "dp_replies4", 6: "dp_replies6"}
TARGET_MAPS: Final = {4: "dp_targets4", 6: "dp_targets6"}
#: What spares look-ups in those tries: buckets by IP version, and how they are asked.
INDEX_MAPS: Final = {4: "dp_index4", 6: "dp_index6"}
MAP_INDEX: Final = "dp_index"
STEERING_MAP_NAMES: Final = (
    MAP_STEERED,
    MAP_STEERED_BEFORE,
    MAP_META,
    *REPLY_MAPS.values(),
    *TARGET_MAPS.values(),
    *INDEX_MAPS.values(),
    MAP_INDEX,
)
PASSED_FIRST: Final = 8
#: Of the ring buffer of drop samples; a power of two. 4,096 bytes hold 58 samples.
DROP_BUFFER_PAGES: Final = 16

VIP_CHECK_CODES: Final = {VipCheck.OFF: 0, VipCheck.FEASIBLE: 1, VipCheck.STRICT: 2}
OTHER_CHECK_CODES: Final = {OtherCheck.OFF: 0, OtherCheck.LOOSE: 1, OtherCheck.STRICT: 2}
#: Bits by IP version.
FEASIBLE_EVERYWHERE: Final = {4: 1, 6: 2}
MORE_VIPS: Final = {4: 1, 6: 2}
SOURCE_ACTION_CODES: Final = {SourceAction.ALLOW: 1, SourceAction.DENY: 2}


class SourceCheck(enum.IntEnum):
    """`enum source_check`: which lists of source rules a network asks."""

    OFF = 0
    COMMON = 1
    EXCEPT = 2
    OWN = 3


class IndexState(enum.IntEnum):
    """`enum index_state`."""

    OFF = 0
    PART = 1
    WHOLE = 2


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
        ("source_check", ctypes.c_uint8),
        ("feasible_everywhere", ctypes.c_uint8),
        ("more_vips", ctypes.c_uint8),
        ("vip4", ctypes.c_uint8 * 4),
        ("vip4_mask", ctypes.c_uint8 * 4),
        ("vip6", ctypes.c_uint8 * 16),
        ("vip6_mask", ctypes.c_uint8 * 16),
    )


class Prefix4Key(ctypes.Structure):
    """`struct prefix4_key`."""

    _fields_ = (
        ("prefix_length", ctypes.c_uint32),
        ("slot", ctypes.c_uint32),
        ("address", ctypes.c_uint8 * 4),
    )


class Prefix6Key(ctypes.Structure):
    """`struct prefix6_key`."""

    _fields_ = (
        ("prefix_length", ctypes.c_uint32),
        ("slot", ctypes.c_uint32),
        ("address", ctypes.c_uint8 * 16),
    )


class Vip4Key(ctypes.Structure):
    """`struct vip4_key`."""

    _fields_ = (("prefix_length", ctypes.c_uint32), ("address", ctypes.c_uint8 * 4))


class Vip6Key(ctypes.Structure):
    """`struct vip6_key`."""

    _fields_ = (("prefix_length", ctypes.c_uint32), ("address", ctypes.c_uint8 * 16))


class SteeredNetwork4(ctypes.Structure):
    """`struct steered_network4`."""

    _fields_ = (
        ("ifindex", ctypes.c_uint32),
        ("gateway", ctypes.c_uint8 * 4),
        ("link", ctypes.c_uint8 * 4),
        ("link_mask", ctypes.c_uint8 * 4),
        ("slot", ctypes.c_uint16),
        ("more_links", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8),
    )


class SteeredNetwork6(ctypes.Structure):
    """`struct steered_network6`."""

    _fields_ = (
        ("ifindex", ctypes.c_uint32),
        ("gateway", ctypes.c_uint8 * 16),
        ("link", ctypes.c_uint8 * 16),
        ("link_mask", ctypes.c_uint8 * 16),
        ("slot", ctypes.c_uint16),
        ("more_links", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8),
    )


class IndexedNetwork4(ctypes.Structure):
    """`struct indexed_network4`."""

    _fields_ = (
        ("address", ctypes.c_uint8 * 4),
        ("ask_trie", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 3),
        ("network", SteeredNetwork4),
    )


class IndexedNetwork6(ctypes.Structure):
    """`struct indexed_network6`."""

    _fields_ = (
        ("address", ctypes.c_uint8 * 16),
        ("ask_trie", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 3),
        ("network", SteeredNetwork6),
    )


class Passed4(ctypes.Structure):
    """`struct passed4`."""

    _fields_ = (("address", ctypes.c_uint8 * 4), ("mask", ctypes.c_uint8 * 4))


class Passed6(ctypes.Structure):
    """`struct passed6`: its fields are 64-bit words there."""

    _fields_ = (("address", ctypes.c_uint8 * 8), ("mask", ctypes.c_uint8 * 8))


class SteeringIndex(ctypes.Structure):
    """`struct steering_index`."""

    _fields_ = (
        ("multiplier4", ctypes.c_uint64),
        ("multiplier6", ctypes.c_uint64),
        ("mask4", ctypes.c_uint8 * 4),
        ("mask6", ctypes.c_uint8 * 16),
        ("state4", ctypes.c_uint8),
        ("state6", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 2),
        ("passed4", Passed4 * PASSED_FIRST),
        ("passed6", Passed6 * PASSED_FIRST),
    )


class PrefixValue(ctypes.Structure):
    """`struct prefix_value`."""

    _fields_ = (("action", ctypes.c_uint8), ("length", ctypes.c_uint8), ("reserved", ctypes.c_uint8 * 2))


class DropControl(ctypes.Structure):
    """`struct drop_control`."""

    _fields_ = (
        ("until_ns", ctypes.c_uint64),
        ("per_second", ctypes.c_uint32),
        ("reader", ctypes.c_uint32),
    )


class DropEvent(ctypes.Structure):
    """`struct drop_event`."""

    _fields_ = (
        ("time_ns", ctypes.c_uint64),
        ("ifindex", ctypes.c_uint32),
        ("slot", ctypes.c_uint16),
        ("source_port", ctypes.c_uint16),
        ("destination_port", ctypes.c_uint16),
        ("verdict", ctypes.c_uint8),
        ("version", ctypes.c_uint8),
        ("protocol", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 3),
        ("source", ctypes.c_uint8 * 16),
        ("destination", ctypes.c_uint8 * 16),
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
    "prefix4_key": Prefix4Key,
    "prefix6_key": Prefix6Key,
    "vip4_key": Vip4Key,
    "vip6_key": Vip6Key,
    "steered_network4": SteeredNetwork4,
    "steered_network6": SteeredNetwork6,
    "indexed_network4": IndexedNetwork4,
    "indexed_network6": IndexedNetwork6,
    "passed4": Passed4,
    "passed6": Passed6,
    "steering_index": SteeringIndex,
    "prefix_value": PrefixValue,
    "drop_control": DropControl,
    "drop_event": DropEvent,
}


def constants() -> dict[str, int]:
    """Every constant that both sides use, by its name in C."""
    return {
        "ABI_VERSION": ABI_VERSION,
        "SLOT_NONE": SLOT_NONE,
        "SLOT_BITS": SLOT_BITS,
        "VLAN_PROTO_GUARD": VLAN_PROTO_GUARD,
        "VERDICT_COUNT": len(Verdict),
        "PASSED_FIRST": PASSED_FIRST,
        **{f"INDEX_{state.name}": int(state) for state in IndexState},
        **{f"VERDICT_{verdict.name}": int(verdict) for verdict in Verdict},
        **{f"VIP_CHECK_{check.name}": code for check, code in VIP_CHECK_CODES.items()},
        **{f"FEASIBLE_EVERYWHERE{version}": bit for version, bit in FEASIBLE_EVERYWHERE.items()},
        **{f"MORE_VIPS{version}": bit for version, bit in MORE_VIPS.items()},
        **{f"SOURCE_CHECK_{check.name}": int(check) for check in SourceCheck},
        **{f"SOURCE_{action.name}": code for action, code in SOURCE_ACTION_CODES.items()},
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
