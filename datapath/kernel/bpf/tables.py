# SPDX-License-Identifier: Apache-2.0
"""What the program's maps hold, as values: the common form of desired and actual state.

`resolve` makes it of an `IngressProgram`, `decode` of the bytes read back from a loaded program; equal
tables are equal behaviour. Nothing here touches the kernel.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from datapath.errors import KernelError
from datapath.kernel.bpf import abi
from datapath.kernel.bpf.source import Capacities
from datapath.plan.ingress import OtherCheck, VipCheck, VlanProtocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datapath.plan.ingress import IngressNetwork, IngressProgram

_VIP_CHECKS = {code: check for check, code in abi.VIP_CHECK_CODES.items()}
_OTHER_CHECKS = {code: check for check, code in abi.OTHER_CHECK_CODES.items()}


@dataclass(frozen=True, slots=True, order=True)
class PointKey:
    """An `IngressPoint` with its device resolved. A device that came back has another ifindex."""

    ifindex: int
    vlan_protocol: int
    vlan_id: int


@dataclass(frozen=True, slots=True)
class NetworkEntry:
    """What the program knows of the network behind a point."""

    slot: int
    fwmark: int
    device_ifindex: int
    vip_check: VipCheck = VipCheck.OFF
    other_check: OtherCheck = OtherCheck.OFF
    check_martians: bool = False
    check_sources: bool = False


@dataclass(frozen=True, slots=True)
class IngressTables:
    """Contents of all maps that user space fills."""

    networks: Mapping[PointKey, NetworkEntry] = field(default_factory=dict)

    @property
    def slots(self) -> frozenset[int]:
        """The slots in use."""
        return frozenset(entry.slot for entry in self.networks.values())

    @property
    def need(self) -> Capacities:
        """The smallest maps that hold this."""
        return Capacities.for_need(networks=len(self.networks), highest_slot=max(self.slots, default=0))


def _check_network(network: IngressNetwork, fwmark_mask: int) -> None:
    if network.fwmark & ~fwmark_mask:
        raise ValueError(f"{network.name}: fwmark {network.fwmark:#x} is outside the mask {fwmark_mask:#x}")
    if not 1 <= network.slot <= 0xFFFF:
        raise ValueError(f"{network.name}: slot {network.slot} is not in 1..65535")
    tagged = network.point.vlan_protocol is not VlanProtocol.UNTAGGED
    if not (1 <= network.point.vlan_id <= 4094 if tagged else network.point.vlan_id == 0):
        raise ValueError(f"{network.name}: {network.point} has no such VLAN id")


def _ifindex(ifname: str, ifindexes: Mapping[str, int]) -> int:
    try:
        return ifindexes[ifname]
    except KeyError:
        raise KernelError(
            "resolve the devices of the eBPF program", f"there is no device {ifname}", errno=errno.ENODEV
        ) from None


def resolve(desired: IngressProgram, ifindexes: Mapping[str, int]) -> IngressTables:
    """The tables of a desired program on this node.

    Raises:
        KernelError: `errno` 19 (ENODEV) if a device does not exist.
        ValueError: the plan contradicts itself (a bug of the compiler): a mark outside the mask, a slot out
            of range, two networks at one point.
    """
    networks: dict[PointKey, NetworkEntry] = {}
    for network in desired.networks:
        _check_network(network, desired.fwmark_mask)
        key = PointKey(
            ifindex=_ifindex(network.point.ifname, ifindexes),
            vlan_protocol=int(network.point.vlan_protocol),
            vlan_id=network.point.vlan_id,
        )
        if key in networks:
            raise ValueError(f"{network.name}: another network has the same point {network.point}")
        networks[key] = NetworkEntry(
            slot=network.slot,
            fwmark=network.fwmark,
            device_ifindex=_ifindex(network.device, ifindexes),
            vip_check=network.vip_check,
            other_check=network.other_check,
            check_martians=network.check_martians,
            check_sources=network.check_sources,
        )
    return IngressTables(networks=networks)


def encode_networks(networks: Mapping[PointKey, NetworkEntry]) -> dict[bytes, bytes]:
    """Elements of `dp_networks`."""
    return {encode_point(key): _encode_entry(entry) for key, entry in networks.items()}


def encode_point(key: PointKey) -> bytes:
    """A key of `dp_networks`."""
    return bytes(abi.NetworkKey(key.ifindex, key.vlan_protocol, key.vlan_id))


def _encode_entry(entry: NetworkEntry) -> bytes:
    return bytes(
        abi.Network(
            fwmark=entry.fwmark,
            device_ifindex=entry.device_ifindex,
            slot=entry.slot,
            vip_check=abi.VIP_CHECK_CODES[entry.vip_check],
            other_check=abi.OTHER_CHECK_CODES[entry.other_check],
            check_martians=entry.check_martians,
            check_sources=entry.check_sources,
        )
    )


def decode_networks(elements: Mapping[bytes, bytes]) -> dict[PointKey, NetworkEntry]:
    """The reverse of `encode_networks`.

    Raises:
        KeyError: a check code that this version does not know.
    """
    networks = {}
    for raw_key, raw in elements.items():
        key = abi.NetworkKey.from_buffer_copy(raw_key)
        entry = abi.Network.from_buffer_copy(raw)
        networks[PointKey(key.ifindex, key.vlan_proto, key.vlan_id)] = NetworkEntry(
            slot=entry.slot,
            fwmark=entry.fwmark,
            device_ifindex=entry.device_ifindex,
            vip_check=_VIP_CHECKS[entry.vip_check],
            other_check=_OTHER_CHECKS[entry.other_check],
            check_martians=bool(entry.check_martians),
            check_sources=bool(entry.check_sources),
        )
    return networks
