# SPDX-License-Identifier: Apache-2.0
"""Addresses, device names and policies of a benchmark node with any number of networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tools.lab.topology import Network, Pair, pair

#: VLAN ids end at 4094.
NETWORKS_MAX: Final = 4094

INTERNAL: Final = pair("10.112.0.0", "fd00:10:112::")
POD: Final = pair("10.112.1.2", "fd00:10:112:1::2")
POD_SIDE: Final = pair("10.112.1.1", "fd00:10:112:1::1")
NODE: Final = pair("192.168.1.10", "2001:db8:fff1::10")
DEFAULT_GATEWAY: Final = pair("192.168.1.1", "2001:db8:fff1::1")
#: Where the default gateway's clients are, and clients of no VIP that the main table expects on the VLAN.
FOREIGN: Final = pair("192.0.2.0", "2001:db8:fff2::")
ROUTED: Final = pair("198.18.0.0", "2001:db8:fff3::")
CLIENTS: Final = pair("198.51.100.0", "2001:db8:fff4::")
#: Pods that no VIP stands for.
OTHER_PODS: Final = pair("10.112.9.0", "fd00:10:112:9::")

#: Of each eight addresses of the measured network: served by a pod that has the VIP, by DNAT, by the node itself.
POD_VIPS, DNAT_VIPS, NODE_VIPS = 8, 16, 24
VIPS: Final = 8

DEFAULT_DEVICE: Final = "mgmt0"
POD_DEVICE: Final = "pod0"


def network(number: int) -> Network:
    """Network 1, 2, ...: a /24 of 100.64.0.0/10 and a /64, the gateway first."""
    if not 1 <= number <= NETWORKS_MAX:
        raise ValueError(f"network {number}: there are 1 to {NETWORKS_MAX}")
    high, low = divmod(number, 256)
    gateway = pair(f"100.{64 + high}.{low}.1", f"2001:db8:{number:x}::1")
    return Network(
        name=f"n{number}",
        suffix="",
        vlan_id=number,
        device=f"eth0.{number}",
        gateway=gateway,
        client=CLIENTS,
        client_vlan=CLIENTS,
        client_overlap=CLIENTS,
        vips={},
    )


def prefixes(of: Network) -> dict[int, str]:
    """The VIP prefix of each family."""
    return {4: f"{of.gateway.v4 - 1}/24", 6: f"{of.gateway.v6 - 1}/64"}


def moved(base: Pair, offset: int) -> Pair:
    """Both addresses, moved by so many."""
    return Pair(base.v4 + offset, base.v6 + offset)


def vip(of: Network, offset: int) -> Pair:
    """The address pair of a network at an offset from its first address."""
    return moved(of.gateway, offset - 1)


def policy(
    numbers: Iterator[int] | range | list[int], *, backend: str = "ebpf", steering: str = "rules"
) -> str:
    """What an operator would write for these networks."""
    lines = [
        "version: 1",
        f"backend: {backend}",
        *([f"steering: {steering}"] if steering != "rules" else []),
        f"node: {{internal: [{INTERNAL.v4}/12, '{INTERNAL.v6}/48']}}",
        "networks:",
    ]
    for number in numbers:
        one = network(number)
        v4, v6 = prefixes(one).values()
        lines.append(
            f"  - {{name: {one.name}, interface: {one.device}, vips: [{v4}, '{v6}'],"
            f" gateway: [{one.gateway.v4}, '{one.gateway.v6}']}}"
        )
    return "\n".join(lines) + "\n"
