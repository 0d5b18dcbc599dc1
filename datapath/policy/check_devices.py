# SPDX-License-Identifier: Apache-2.0
"""Each network has a device of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.errors import PolicyPath, Problem
from datapath.policy.addresses import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.model import Network
    from datapath.policy.readable import Readable


def devices(readable: Readable) -> Iterator[Problem]:
    """No two networks on one device or one VLAN, and no VRF of the same name."""
    by_name: dict[str, tuple[int, str]] = {}
    by_tag: dict[tuple[str, int, int], tuple[int, str]] = {}
    for index, network in readable.networks:
        if network.vlan is not None:
            tag = (network.vlan.parent, int(network.vlan.protocol), network.vlan.id)
            other = by_tag.setdefault(tag, (index, network.name))
            if other[0] != index:
                yield Problem(
                    ("networks", index, "vlan"),
                    f"VLAN {network.vlan.id} on {shown(network.vlan.parent)} is already that of network "
                    f"{shown(other[1])}",
                    "a device belongs to one network: list all its VIPs there",
                )
                continue
        other = by_name.setdefault(network.device, (index, network.name))
        if other[0] != index:
            yield Problem(
                _device_path(index, network),
                f"the device {shown(network.device)} is already that of network {shown(other[1])}",
                "a device belongs to one network: list all its VIPs there",
            )
    for index, network in readable.networks:
        if network.vrf is not None and network.vrf.name in by_name:
            owner = by_name[network.vrf.name][1]
            yield Problem(
                ("networks", index, "vrf", "name"),
                f"the VRF {shown(network.vrf.name)} has the name of the device of network {shown(owner)}",
                "give the VRF another name",
            )


def parents(readable: Readable) -> Iterator[Problem]:
    """No VLAN device is, through others, its own trunk."""
    parent_of = {n.vlan.name: n.vlan.parent for _, n in readable.networks if n.vlan is not None}
    settled: set[str] = set()
    for index, network in readable.networks:
        if network.vlan is None:
            continue
        seen: dict[str, None] = {}
        name = network.vlan.name
        while name in parent_of and name not in settled and name not in seen:
            seen[name] = None
            name = parent_of[name]
        if name in seen:
            yield Problem(
                ("networks", index, "vlan", "parent"),
                f"the device {shown(network.vlan.name)} is on top of itself",
                "name the trunk that carries the tagged frames",
            )
        settled.update(seen)


def _device_path(index: int, network: Network) -> PolicyPath:
    return ("networks", index, "interface") if network.vlan is None else ("networks", index, "vlan", "name")
