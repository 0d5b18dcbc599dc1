# SPDX-License-Identifier: Apache-2.0
"""What the maps of the egress program hold, as values and as bytes."""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

from datapath.errors import KernelError
from datapath.kernel.bpf import abi
from datapath.kernel.bpf.encoding import Elements, decode_prefixes, encode_prefixes
from datapath.plan.ingress import SourceAction

if TYPE_CHECKING:
    from collections.abc import Mapping
    from ipaddress import IPv4Address, IPv6Address

    from datapath.kernel.bpf.tables import SlotPrefix
    from datapath.plan.ingress import IpNetwork
    from datapath.plan.steering import SteeringProgram


@dataclass(frozen=True, slots=True)
class Way:
    """Where answers go whose source is a VIP.

    Attributes:
        link: the first prefix that is on the link; the program compares it by itself.
        more_links: there are others, among the targets of the slot.
    """

    slot: int
    ifindex: int
    gateway: IPv4Address | IPv6Address
    link: IpNetwork | None = None
    more_links: bool = False


@dataclass(frozen=True, slots=True)
class SteeringTables:
    """Contents of all maps that user space fills.

    Attributes:
        replies: by VIP.
        targets: destinations on the link of a network, by slot, but the first; in slot 0 those that are never steered.
        is_indexed: what lies over both (`steering_index`) is in force and says the same.
    """

    replies: Mapping[IpNetwork, Way] = field(default_factory=dict)
    targets: frozenset[SlotPrefix] = frozenset()
    is_indexed: bool = True

    @property
    def highest_slot(self) -> int:
        return max((way.slot for way in self.replies.values()), default=0)

    @property
    def slots(self) -> frozenset[int]:
        return frozenset(way.slot for way in self.replies.values())

    def joined(self, older: SteeringTables) -> SteeringTables:
        """Everything of both; where both know a VIP, this one decides."""
        return SteeringTables({**older.replies, **self.replies}, self.targets | older.targets)


def resolve_steering(desired: SteeringProgram, ifindexes: Mapping[str, int]) -> SteeringTables:
    """The tables of a desired program on this node.

    Raises:
        KernelError: `errno` 19 (ENODEV) if a device does not exist.
        ValueError: two networks have the same VIP (a bug of the compiler).
    """
    replies: dict[IpNetwork, Way] = {}
    targets: set[SlotPrefix] = {(abi.SLOT_NONE, prefix) for prefix in desired.passed if desired.networks}
    for network in desired.networks:
        if network.device not in ifindexes:
            raise KernelError(
                "resolve the devices of the egress program",
                f"there is no device {network.device}",
                errno=errno.ENODEV,
            )
        links = {
            version: [prefix for prefix in network.on_link if prefix.version == version] for version in (4, 6)
        }
        for vip in network.vips:
            if vip in replies:
                raise ValueError(f"{network.name}: another network has the VIP {vip}")
            on_link = links[vip.version]
            replies[vip] = Way(
                network.slot,
                ifindexes[network.device],
                network.gateway(vip.version),
                on_link[0] if on_link else None,
                len(on_link) > 1,
            )
        targets |= {(network.slot, prefix) for found in links.values() for prefix in found[1:]}
    return SteeringTables(replies, frozenset(targets))


def encode_replies(replies: Mapping[IpNetwork, Way]) -> dict[int, Elements]:
    """Elements of the two tries, by IP version."""
    elements: dict[int, Elements] = {4: {}, 6: {}}
    for vip, way in replies.items():
        key_type, value_type = (
            (abi.Vip4Key, abi.SteeredNetwork4) if vip.version == 4 else (abi.Vip6Key, abi.SteeredNetwork6)
        )
        size = len(vip.network_address.packed)
        array = ctypes.c_uint8 * size
        link = (bytes(size), b"\xff" * size)
        if way.link is not None:
            link = (way.link.network_address.packed, way.link.netmask.packed)
        key = key_type(prefix_length=vip.prefixlen, address=array(*vip.network_address.packed))
        value = value_type(
            ifindex=way.ifindex,
            gateway=array(*way.gateway.packed),
            link=array(*link[0]),
            link_mask=array(*link[1]),
            slot=way.slot,
            more_links=way.more_links,
        )
        elements[vip.version][bytes(key)] = bytes(value)
    return elements


def decode_replies(elements: Mapping[int, Elements]) -> dict[IpNetwork, Way]:
    """The reverse of `encode_replies`."""
    replies: dict[IpNetwork, Way] = {}
    for raw_key, raw in elements[4].items():
        key, value = abi.Vip4Key.from_buffer_copy(raw_key), abi.SteeredNetwork4.from_buffer_copy(raw)
        way = _way(value)
        replies[IPv4Network((bytes(key.address), key.prefix_length))] = way
    for raw_key, raw in elements[6].items():
        key6, value6 = abi.Vip6Key.from_buffer_copy(raw_key), abi.SteeredNetwork6.from_buffer_copy(raw)
        way = _way(value6)
        replies[IPv6Network((bytes(key6.address), key6.prefix_length))] = way
    return replies


def _way(value: abi.SteeredNetwork4 | abi.SteeredNetwork6) -> Way:
    address, mask = bytes(value.link), bytes(value.link_mask)
    length = int.from_bytes(mask, "big").bit_count()
    link = ip_network((address, length)) if any(address) or length < 8 * len(mask) else None
    return Way(value.slot, value.ifindex, ip_address(bytes(value.gateway)), link, bool(value.more_links))


def encode_targets(targets: frozenset[SlotPrefix]) -> dict[int, Elements]:
    """Elements of the two tries, by IP version."""
    return encode_prefixes(dict.fromkeys(targets, SourceAction.ALLOW))


def decode_targets(elements: Mapping[int, Elements]) -> frozenset[SlotPrefix]:
    """The reverse of `encode_targets`."""
    return frozenset(decode_prefixes(elements))
