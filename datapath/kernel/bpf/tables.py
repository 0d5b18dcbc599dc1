# SPDX-License-Identifier: Apache-2.0
"""What the program's maps hold, as values: the common form of desired and actual state.

`resolve` makes it of an `IngressProgram`; `encoding.py` turns it into bytes and back. Equal tables are
equal behaviour. Nothing here touches the kernel.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from datapath.errors import KernelError
from datapath.kernel.bpf import abi
from datapath.kernel.bpf.abi import SourceCheck
from datapath.kernel.bpf.source import Capacities
from datapath.plan.ingress import OtherCheck, SourceAction, VipCheck, VlanProtocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from ipaddress import IPv4Network, IPv6Network

    from datapath.plan.ingress import IngressNetwork, IngressProgram, IpNetwork, SourceRule


class PrefixTable(enum.StrEnum):
    """The questions that longest-prefix matches answer."""

    COMMON = "common"
    SOURCES = "sources"
    VIPS = "vips"
    FEASIBLE = "feasible"


@dataclass(frozen=True, slots=True, order=True)
class PointKey:
    """An `IngressPoint` with its device resolved. A device that came back has another ifindex."""

    ifindex: int
    vlan_protocol: int
    vlan_id: int


@dataclass(frozen=True, slots=True)
class NetworkEntry:
    """What the program knows of the network behind a point.

    Attributes:
        feasible_everywhere: IP versions in which every source is feasible; no prefixes are kept for them.
        first_vip4: the first IPv4 prefix of its VIPs, which the program compares by itself.
        first_vip6: the same of IPv6.
        more_vips: IP versions in which there are others, kept as prefixes.
    """

    slot: int
    fwmark: int
    device_ifindex: int
    vip_check: VipCheck = VipCheck.OFF
    other_check: OtherCheck = OtherCheck.OFF
    check_martians: bool = False
    source_check: SourceCheck = SourceCheck.OFF
    feasible_everywhere: frozenset[int] = frozenset()
    first_vip4: IPv4Network | None = None
    first_vip6: IPv6Network | None = None
    more_vips: frozenset[int] = frozenset()

    @property
    def is_checked(self) -> bool:
        """Whether any check may drop a packet."""
        return (
            self.check_martians
            or self.source_check is not SourceCheck.OFF
            or self.vip_check is not VipCheck.OFF
            or self.other_check is not OtherCheck.OFF
        )


#: A prefix of one network; slot 0: of all, in `COMMON` only.
SlotPrefix = tuple[int, "IpNetwork"]


def _no_prefixes() -> dict[PrefixTable, Mapping[SlotPrefix, SourceAction]]:
    return {table: {} for table in PrefixTable}


@dataclass(frozen=True, slots=True)
class IngressTables:
    """Contents of all maps that user space fills.

    Attributes:
        networks: by point. A point with `abi.VLAN_PROTO_GUARD` stands for a device with checked networks.
        prefixes: by question; but for sources every action is ALLOW.
    """

    networks: Mapping[PointKey, NetworkEntry] = field(default_factory=dict)
    prefixes: Mapping[PrefixTable, Mapping[SlotPrefix, SourceAction]] = field(default_factory=_no_prefixes)

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


def _source_check(network: IngressNetwork) -> SourceCheck:
    if not network.check_sources:
        return SourceCheck.OFF
    if not network.sources:
        return SourceCheck.COMMON
    denies = any(rule.action is SourceAction.DENY for rule in network.sources)
    return SourceCheck.OWN if denies else SourceCheck.EXCEPT


def _feasible_everywhere(network: IngressNetwork) -> frozenset[int]:
    """Nearly every network has a default gateway: that saves a look-up a packet."""
    if network.vip_check is VipCheck.OFF:
        return frozenset()
    return frozenset(prefix.version for prefix in network.feasible if prefix.prefixlen == 0)


def _asked_vips(network: IngressNetwork) -> dict[int, list[IpNetwork]]:
    """By IP version, where a check asks for them. Nearly every network has one: the program has it at hand."""
    vips = (
        network.vips
        if network.vip_check is not VipCheck.OFF or network.other_check is not OtherCheck.OFF
        else ()
    )
    asked: dict[int, list[IpNetwork]] = {4: [], 6: []}
    for prefix in vips:
        asked[prefix.version].append(prefix)
    return asked


def _entry(
    network: IngressNetwork, vips: Mapping[int, Sequence[IpNetwork]], ifindexes: Mapping[str, int]
) -> NetworkEntry:
    return NetworkEntry(
        slot=network.slot,
        fwmark=network.fwmark,
        device_ifindex=_ifindex(network.device, ifindexes),
        vip_check=network.vip_check,
        other_check=network.other_check,
        check_martians=network.check_martians,
        source_check=_source_check(network),
        feasible_everywhere=_feasible_everywhere(network),
        first_vip4=next((prefix for prefix in vips[4] if prefix.version == 4), None),
        first_vip6=next((prefix for prefix in vips[6] if prefix.version == 6), None),
        more_vips=frozenset(version for version, prefixes in vips.items() if len(prefixes) > 1),
    )


def _add_rules(table: dict[SlotPrefix, SourceAction], slot: int, rules: Iterable[SourceRule]) -> None:
    for rule in rules:
        before = table.setdefault((slot, rule.prefix), rule.action)
        if before is not rule.action:
            raise ValueError(f"source rules say both allow and deny for {rule.prefix}")


def _prefixes(
    desired: IngressProgram, asked: Sequence[Mapping[int, Sequence[IpNetwork]]]
) -> dict[PrefixTable, Mapping[SlotPrefix, SourceAction]]:
    """Only the prefixes that some check asks for."""
    common: dict[SlotPrefix, SourceAction] = {}
    sources: dict[SlotPrefix, SourceAction] = {}
    vips: dict[SlotPrefix, SourceAction] = {}
    feasible: dict[SlotPrefix, SourceAction] = {}
    if any(network.check_sources for network in desired.networks):
        _add_rules(common, abi.SLOT_NONE, desired.common_sources)
    for network, vips_of_network in zip(desired.networks, asked, strict=True):
        if network.check_sources:
            _add_rules(sources, network.slot, network.sources)
        for prefixes in vips_of_network.values():
            vips.update({(network.slot, prefix): SourceAction.ALLOW for prefix in prefixes[1:]})
        if network.vip_check is not VipCheck.OFF:
            everywhere = _feasible_everywhere(network)
            feasible.update(
                {
                    (network.slot, prefix): SourceAction.ALLOW
                    for prefix in network.feasible
                    if prefix.version not in everywhere
                }
            )
    return {
        PrefixTable.COMMON: common,
        PrefixTable.SOURCES: sources,
        PrefixTable.VIPS: vips,
        PrefixTable.FEASIBLE: feasible,
    }


def _guards(networks: Mapping[PointKey, NetworkEntry]) -> dict[PointKey, NetworkEntry]:
    return {
        PointKey(key.ifindex, abi.VLAN_PROTO_GUARD, 0): NetworkEntry(
            slot=abi.SLOT_NONE, fwmark=0, device_ifindex=key.ifindex, check_martians=True
        )
        for key, entry in networks.items()
        if entry.is_checked
    }


def resolve(desired: IngressProgram, ifindexes: Mapping[str, int]) -> IngressTables:
    """The tables of a desired program on this node.

    Raises:
        KernelError: `errno` 19 (ENODEV) if a device does not exist.
        ValueError: the plan contradicts itself (a bug of the compiler): a mark outside the mask, a slot out
            of range, two networks at one point, a source prefix both allowed and denied.
    """
    networks: dict[PointKey, NetworkEntry] = {}
    asked = [_asked_vips(network) for network in desired.networks]
    for network, vips in zip(desired.networks, asked, strict=True):
        _check_network(network, desired.fwmark_mask)
        key = PointKey(
            ifindex=_ifindex(network.point.ifname, ifindexes),
            vlan_protocol=int(network.point.vlan_protocol),
            vlan_id=network.point.vlan_id,
        )
        if key in networks:
            raise ValueError(f"{network.name}: another network has the same point {network.point}")
        networks[key] = _entry(network, vips, ifindexes)
    return IngressTables(networks=networks | _guards(networks), prefixes=_prefixes(desired, asked))
