# SPDX-License-Identifier: Apache-2.0
"""The matrix of design section 3 as data: who asks what, and by which way the answer must leave the node."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from dataclasses import dataclass

from tools.lab import topology as topo
from tools.lab.topology import FAMILIES, VIP_BACKENDS, Backend, IpAddress, Network


class Proto(enum.StrEnum):
    """What is asked with."""

    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"


class Way(enum.StrEnum):
    """How packets of a flow leave the node.

    `BOUNCED`: the request itself was sent back out of the VLAN, on its way to the pod.
    """

    ROUTER = "VLAN router"
    ON_LINK = "on the VLAN"
    INSIDE = "inside"
    GATEWAY = "default gw"
    BOUNCED = "request bounced"
    NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class Cell:
    """One request.

    Attributes:
        client: the namespace role that asks.
        network: the name of the network whose VIP is asked.
        expect: the way that the answer must take.
        without_policy: whether it works on a node without any policy.
        source_port: the client's port or echo identifier; 0 for any.
    """

    client: str
    backend: Backend
    proto: Proto
    family: int
    network: str
    target: IpAddress
    expect: Way
    without_policy: bool
    source_port: int = 0

    def __str__(self) -> str:
        """Return a name that is good for test ids and messages."""
        return f"{self.client} -> {self.backend} ({self.target}) {self.proto} IPv{self.family}"


def vlan_cells(networks: Sequence[Network]) -> list[Cell]:
    """Return the requests that come in by the VLANs: all fail without a policy."""
    return [
        Cell(
            client,
            backend,
            proto,
            family,
            n.name,
            n.vips[backend].get(family),
            Way.ON_LINK if client.startswith("client_vlan") else Way.ROUTER,
            without_policy=False,
        )
        for n in networks
        for client in n.clients
        for backend in VIP_BACKENDS
        for proto in Proto
        for family in FAMILIES
    ]


def inside_cells(networks: Sequence[Network]) -> list[Cell]:
    """Return the requests of pods and nodes to the VIPs: served inside, with and without policy."""
    return [
        Cell(
            client,
            backend,
            proto,
            family,
            n.name,
            n.vips[backend].get(family),
            Way.INSIDE,
            without_policy=True,
        )
        for n in networks
        for client in ("pod_a", "pod_b", "node", "pod_remote")
        for backend in VIP_BACKENDS
        for proto in Proto
        for family in FAMILIES
    ]


def elsewhere_cells() -> list[Cell]:
    """Return the requests of pods and the node to the rest of the world: by the default gateway, as ever."""
    return [
        Cell(
            client,
            Backend.ELSEWHERE,
            proto,
            family,
            "",
            topo.ELSEWHERE.get(family),
            Way.GATEWAY,
            without_policy=True,
        )
        for client in ("pod_a", "pod_b", "node")
        for proto in Proto
        for family in FAMILIES
    ]


def matrix(networks: Sequence[Network]) -> list[Cell]:
    """Return the whole matrix."""
    return vlan_cells(networks) + inside_cells(networks) + elsewhere_cells()


def same_ports(cells: Sequence[Cell]) -> list[Cell]:
    """Requests that differ in nothing but their client and network, from the same source port."""
    ports: dict[tuple[IpAddress, Proto], int] = {}
    for cell in cells:
        ports.setdefault((cell.target, cell.proto), 42000 + len(ports))
    return [dataclasses.replace(cell, source_port=ports[cell.target, cell.proto]) for cell in cells]
