# SPDX-License-Identifier: Apache-2.0
"""Addresses and names of the lab, as data: the design's node with any number of networks."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

IpAddress = IPv4Address | IPv6Address
FAMILIES = (4, 6)


class Backend(enum.StrEnum):
    """What answers at an address."""

    LOCAL_POD = "local pod"
    REMOTE_POD = "remote pod"
    HOST_VIP = "VIP on node"
    HOST_DNAT = "host network"
    ELSEWHERE = "elsewhere"


VIP_BACKENDS = (Backend.LOCAL_POD, Backend.REMOTE_POD, Backend.HOST_VIP, Backend.HOST_DNAT)


@dataclass(frozen=True, slots=True)
class Pair:
    """One IPv4 and one IPv6 address of the same thing."""

    v4: IPv4Address
    v6: IPv6Address

    def get(self, family: int) -> IpAddress:
        """Return the address of family 4 or 6."""
        return self.v4 if family == 4 else self.v6

    def __iter__(self) -> Iterator[IpAddress]:
        yield self.v4
        yield self.v6


def pair(v4: str, v6: str) -> Pair:
    """Parse two addresses."""
    return Pair(IPv4Address(v4), IPv6Address(v6))


POD_CIDRS = {4: "10.112.0.0/12", 6: "fd00:10:112::/48"}
SERVICE_CIDRS = {4: "10.96.0.0/12", 6: "fd00:10:96::/48"}
POD_A = pair("10.112.1.2", "fd00:10:112:1::2")
POD_B = pair("10.112.1.3", "fd00:10:112:1::3")
POD_REMOTE = pair("10.112.2.2", "fd00:10:112:2::2")
NODE = pair("192.168.1.10", "2001:db8:1::10")
NODE2 = pair("192.168.1.11", "2001:db8:1::11")
GW = pair("192.168.1.1", "2001:db8:1::1")
ELSEWHERE = pair("203.0.113.1", "2001:db8:ffff::1")
#: Of eth0's own subnet, and yet behind the VLAN's router.
OVERLAP = pair("192.168.1.77", "2001:db8:1::77")
SERVICE_PORT = 80
BACKEND_PORT = 8080


@dataclass(frozen=True, slots=True)
class Network:
    """A network that clients come from, and the namespaces on its side.

    Attributes:
        suffix: of the namespace roles: ``""`` for the first (``client``, ``router``), else ``"2"``...
        device: its device on the node.
        gateway: the router's addresses on it; prefix lengths are /24 and /64.
        client, client_vlan, client_overlap: addresses of its three kinds of clients.
        vips: an address pair per backend kind.
    """

    name: str
    suffix: str
    vlan_id: int
    device: str
    gateway: Pair
    client: Pair
    client_vlan: Pair
    client_overlap: Pair
    vips: dict[Backend, Pair] = field(hash=False)

    @property
    def prefixes(self) -> dict[int, str]:
        """The on-link prefixes, by family."""
        return _prefixes(self.gateway)

    @property
    def vip_prefixes(self) -> dict[int, str]:
        """The VIPs' prefixes, by family: those of another network where it has the same ones."""
        return _prefixes(self.vips[Backend.HOST_VIP])

    def role(self, base: str) -> str:
        """Return the namespace role (``client``, ``client_vlan``, ``client_overlap``, ``router``) of this network."""
        return base + self.suffix

    @property
    def clients(self) -> dict[str, Pair]:
        """The clients' addresses by role."""
        return {
            self.role("client"): self.client,
            self.role("client_vlan"): self.client_vlan,
            self.role("client_overlap"): self.client_overlap,
        }


def _prefixes(address: Pair) -> dict[int, str]:
    return {
        4: str(address.v4).rsplit(".", 1)[0] + ".0/24",
        6: str(address.v6).rsplit(":", 1)[0] + ":/64",
    }


def network(index: int = 0, *, same_clients: bool = False, same_vips: bool = False) -> Network:
    """Return the lab's network number `index` (0..90): VLAN ``100 * (index + 1)``, 1.2.<3+index>.0/24.

    Args:
        index: which one.
        same_clients: give its outside client the addresses of the first network's.
        same_vips: serve the first network's VIPs on it, too.
    """
    vlan_id = 100 * (index + 1) if index < 40 else 4000 + index
    net4, net6 = f"1.2.{3 + index}", f"2001:db8:{100 * (index + 1)}:"
    far = 0 if same_clients else index
    vip4, vip6 = (net4, net6) if not same_vips else ("1.2.3", "2001:db8:100:")
    return Network(
        name="public" if index == 0 else f"public{index + 1}",
        suffix="" if index == 0 else str(index + 1),
        vlan_id=vlan_id,
        device=f"eth0.{vlan_id}",
        gateway=pair(f"{net4}.1", f"{net6}:1"),
        client=pair(f"198.51.{100 + far}.10", f"2001:db8:c{far:02x}::10"),
        client_vlan=pair(f"{net4}.200", f"{net6}:200"),
        client_overlap=pair(f"192.168.1.{77 + index}", f"2001:db8:1::{77 + index}"),
        vips={b: pair(f"{vip4}.{10 + i}", f"{vip6}:{10 + i}") for i, b in enumerate(VIP_BACKENDS)},
    )


def backend_address(backend: Backend) -> Pair:
    """Return where kube-proxy sends a backend kind's traffic (host VIPs are not sent anywhere)."""
    return {
        Backend.LOCAL_POD: POD_A,
        Backend.REMOTE_POD: POD_REMOTE,
        Backend.HOST_DNAT: NODE,
        Backend.ELSEWHERE: ELSEWHERE,
    }[backend]


def family_of(address: str | IpAddress) -> int:
    """Return 4 or 6."""
    return ip_address(str(address)).version
