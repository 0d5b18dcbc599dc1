# SPDX-License-Identifier: Apache-2.0
"""Networks that share a VRF share its routing table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.errors import Problem
from datapath.policy.addresses import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.addresses import IpAddress
    from datapath.policy.readable import Readable


def shared_tables(readable: Readable) -> Iterator[Problem]:
    """One default route a family, and no prefix on two links."""
    gateways: dict[tuple[str, int], tuple[int, IpAddress]] = {}
    prefixes: dict[tuple[str, object], int] = {}
    names = {index: network.name for index, network in readable.networks}
    for index, network in readable.networks:
        if network.vrf is None:
            continue
        vrf = network.vrf.name
        for address in network.gateway_addresses:
            other, _ = gateways.setdefault((vrf, address.version), (index, address))
            if other != index:
                yield Problem(
                    ("networks", index, "gateways" if network.gateways else "gateway"),
                    f"VRF {shown(vrf)} has the IPv{address.version} gateway of network {shown(names[other])} already",
                    "a VRF routes by one table, which has one default route: give this network a VRF of its own",
                )
        for prefix in network.link_prefixes:
            first = prefixes.setdefault((vrf, prefix), index)
            if first != index:
                yield Problem(
                    ("networks", index, "on_link" if network.on_link else "vips"),
                    f"{prefix} is on the link of network {shown(names[first])} already, in the same VRF {shown(vrf)}",
                    "name what is on this link in `on_link`, or give the network a VRF of its own",
                )
