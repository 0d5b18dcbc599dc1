# SPDX-License-Identifier: Apache-2.0
"""`IngressTables` as map elements, and back."""

from __future__ import annotations

import struct
import sys
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING, Final

from datapath.errors import KernelError
from datapath.kernel.bpf import abi
from datapath.kernel.bpf.tables import NetworkEntry, PointKey, SlotPrefix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datapath.plan.ingress import SourceAction

Elements = dict[bytes, bytes]

_VIP_CHECKS: Final = {code: check for check, code in abi.VIP_CHECK_CODES.items()}
_OTHER_CHECKS: Final = {code: check for check, code in abi.OTHER_CHECK_CODES.items()}
_ACTIONS: Final = {code: action for action, code in abi.SOURCE_ACTION_CODES.items()}

# The same layouts as those of `abi`, which are read with: ctypes takes ten times as long to fill one.
_NETWORK_KEY: Final = struct.Struct("=IHH")
_NETWORK: Final = struct.Struct("=IIHBBBBBB4s4s16s16s")
_PREFIX_KEYS: Final = {4: struct.Struct("=II4s"), 6: struct.Struct("=II16s")}
_PREFIX_VALUE: Final = struct.Struct("=BB2x")
_NO_VIP: Final = {4: (b"\xff" * 4, bytes(4)), 6: (b"\xff" * 16, bytes(16))}


def _first_vip(address: bytes, mask: bytes) -> IPv4Network | IPv6Network | None:
    """The reverse of address and mask.

    Raises:
        KernelError: no `encode_networks` wrote this.
    """
    if (address, mask) == (b"\xff" * len(address), bytes(len(mask))):
        return None
    prefix = ip_network((address, int.from_bytes(mask, "big").bit_count()), strict=False)
    if (prefix.network_address.packed, prefix.netmask.packed) != (address, mask):
        raise KernelError(
            "read the networks of the eBPF program",
            f"VIP {address.hex()} with mask {mask.hex()} is no prefix",
        )
    return prefix


def _vip(prefix: IPv4Network | IPv6Network | None, version: int) -> tuple[bytes, bytes]:
    return _NO_VIP[version] if prefix is None else (prefix.network_address.packed, prefix.netmask.packed)


def encode_networks(networks: Mapping[PointKey, NetworkEntry]) -> Elements:
    """Elements of `dp_networks`."""
    return {
        _NETWORK_KEY.pack(key.ifindex, key.vlan_protocol, key.vlan_id): _NETWORK.pack(
            entry.fwmark,
            entry.device_ifindex,
            entry.slot,
            abi.VIP_CHECK_CODES[entry.vip_check],
            abi.OTHER_CHECK_CODES[entry.other_check],
            entry.check_martians,
            entry.source_check,
            sum(abi.FEASIBLE_EVERYWHERE[v] for v in entry.feasible_everywhere),
            sum(abi.MORE_VIPS[v] for v in entry.more_vips),
            *_vip(entry.first_vip4, 4),
            *_vip(entry.first_vip6, 6),
        )
        for key, entry in networks.items()
    }


def decode_networks(elements: Mapping[bytes, bytes]) -> dict[PointKey, NetworkEntry]:
    """The reverse of `encode_networks`.

    Raises:
        KeyError: a check code that this version does not know.
        KernelError: a VIP that is no prefix.
    """
    networks = {}
    for raw_key, raw in elements.items():
        key = abi.NetworkKey.from_buffer_copy(raw_key)
        entry = abi.Network.from_buffer_copy(raw)
        first_vip4 = _first_vip(bytes(entry.vip4), bytes(entry.vip4_mask))
        first_vip6 = _first_vip(bytes(entry.vip6), bytes(entry.vip6_mask))
        networks[PointKey(key.ifindex, key.vlan_proto, key.vlan_id)] = NetworkEntry(
            slot=entry.slot,
            fwmark=entry.fwmark,
            device_ifindex=entry.device_ifindex,
            vip_check=_VIP_CHECKS[entry.vip_check],
            other_check=_OTHER_CHECKS[entry.other_check],
            check_martians=bool(entry.check_martians),
            source_check=abi.SourceCheck(entry.source_check),
            feasible_everywhere=frozenset(
                version for version, bit in abi.FEASIBLE_EVERYWHERE.items() if entry.feasible_everywhere & bit
            ),
            first_vip4=first_vip4 if isinstance(first_vip4, IPv4Network) else None,
            first_vip6=first_vip6 if isinstance(first_vip6, IPv6Network) else None,
            more_vips=frozenset(version for version, bit in abi.MORE_VIPS.items() if entry.more_vips & bit),
        )
    return networks


def encode_prefixes(prefixes: Mapping[SlotPrefix, SourceAction]) -> dict[int, Elements]:
    """Elements of the two tries of one question, by IP version."""
    elements: dict[int, Elements] = {4: {}, 6: {}}
    for (slot, prefix), action in prefixes.items():
        version, length = prefix.version, prefix.prefixlen
        key = _PREFIX_KEYS[version].pack(abi.SLOT_BITS + length, slot, prefix.network_address.packed)
        elements[version][key] = _PREFIX_VALUE.pack(abi.SOURCE_ACTION_CODES[action], length)
    return elements


def slots_of(networks: Elements) -> frozenset[int]:
    """The slots in elements of `dp_networks`."""
    offset = abi.Network.slot.offset
    return frozenset(int.from_bytes(raw[offset : offset + 2], sys.byteorder) for raw in networks.values())


def decode_prefixes(elements: Mapping[int, Elements]) -> dict[SlotPrefix, SourceAction]:
    """The reverse of `encode_prefixes`."""
    prefixes: dict[SlotPrefix, SourceAction] = {}
    for raw_key, raw in elements[4].items():
        key = abi.Prefix4Key.from_buffer_copy(raw_key)
        network4 = IPv4Network((bytes(key.address), key.prefix_length - abi.SLOT_BITS))
        prefixes[key.slot, network4] = _ACTIONS[raw[0]]
    for raw_key, raw in elements[6].items():
        key6 = abi.Prefix6Key.from_buffer_copy(raw_key)
        network6 = IPv6Network((bytes(key6.address), key6.prefix_length - abi.SLOT_BITS))
        prefixes[key6.slot, network6] = _ACTIONS[raw[0]]
    return prefixes
