# SPDX-License-Identifier: Apache-2.0
"""Routing nouns: ip rules, routes, VLAN and VRF devices, and sysctls."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from datapath.plan.ingress import IpNetwork, VlanProtocol, address_text, prefix_text

#: FRA_PROTOCOL and rtm_protocol of everything that is ours; in no rt_protos file that we know of
#: (bird 12, FRR 11 and 186..197, keepalived 18, Calico 80, Cilium uses 2).
ROUTE_PROTOCOL = 78

TABLE_MAIN = 254
TABLE_LOCAL = 255
#: RT_TABLE_UNSPEC, default, main and local: never ours to allocate.
RESERVED_TABLES = frozenset({0, 253, 254, 255})


class Family(enum.IntEnum):
    """IP version; the number that people say, not the AF_ constant."""

    IPV4 = 4
    IPV6 = 6


class RuleAction(enum.StrEnum):
    """FR_ACT_* of `linux/fib_rules.h`, as ip(8) names them."""

    LOOKUP = "lookup"
    GOTO = "goto"
    NOP = "nop"


_ACTION_ORDER = {action: position for position, action in enumerate(RuleAction)}


@dataclass(frozen=True, slots=True)
class FibRule:
    """One ip rule of ours.

    Attributes:
        target: the table of a `lookup`, the priority of a `goto`, 0 for `nop`.
        fwmark: compared under `fwmask`; a zero mask compares nothing.
        device: that the packet entered by, for IPv6 the VRF where that is in one; empty for any.
    """

    family: Family
    priority: int
    action: RuleAction
    target: int = 0
    fwmark: int = 0
    fwmask: int = 0
    source: IpNetwork | None = None
    destination: IpNetwork | None = None
    device: str = ""

    def __hash__(self) -> int:
        # Sets of thousands are made of these: a prefix takes ten times as long as what tells rules apart anyway.
        source = self.source and int(self.source.network_address)
        return hash((self.family, self.priority, self.fwmark, self.target, source))

    def sort_key(self) -> tuple[int | str, ...]:
        """Order of the kernel's own walk, then a stable one."""
        return (
            self.family,
            self.priority,
            self.fwmask,
            self.fwmark,
            _ACTION_ORDER[self.action],
            self.target,
            *_network_key(self.source),
            *_network_key(self.destination),
            self.device,
        )

    def render(self) -> str:
        """As `ip rule add` takes it, after the family."""
        source = "all" if self.source is None else prefix_text(self.source)
        words = [f"-{self.family} priority {self.priority} from {source}"]
        if self.destination is not None:
            words.append(f"to {prefix_text(self.destination)}")
        if self.device:
            words.append(f"iif {self.device}")
        if self.fwmask:
            words.append(f"fwmark {self.fwmark:#010x}/{self.fwmask:#010x}")
        words.append(str(self.action) if self.action is RuleAction.NOP else f"{self.action} {self.target}")
        words.append(f"protocol {ROUTE_PROTOCOL}")
        return " ".join(words)


class RouteType(enum.StrEnum):
    """RTN_* of `linux/rtnetlink.h`."""

    UNICAST = "unicast"
    UNREACHABLE = "unreachable"


_TYPE_ORDER = {type_: position for position, type_ in enumerate(RouteType)}


@dataclass(frozen=True, slots=True)
class NextHop:
    """One of several gateways of a route.

    Attributes:
        weight: its share of the flows, 1..256. The shares lie one behind the other in the order of the hops.
        device: only where it is not the route's; never in a plan.
    """

    gateway: IPv4Address | IPv6Address
    weight: int = 1
    device: str = ""

    def render(self, device: str) -> str:
        return f"nexthop via {address_text(self.gateway)} dev {self.device or device} weight {self.weight} onlink"


@dataclass(frozen=True, slots=True)
class Route:
    """One route of ours. A gateway is always on-link: the kernel need not resolve it first.

    Attributes:
        hops: instead of `gateway`, two or more.
    """

    table: int
    destination: IpNetwork
    device: str = ""
    gateway: IPv4Address | IPv6Address | None = None
    type: RouteType = RouteType.UNICAST
    metric: int = 0
    hops: tuple[NextHop, ...] = ()

    def __hash__(self) -> int:
        # As for rules.
        return hash((self.table, self.metric, self.device, int(self.destination.network_address)))

    @property
    def family(self) -> Family:
        return Family(self.destination.version)

    def sort_key(self) -> tuple[int | str, ...]:
        gateway = 0 if self.gateway is None else int(self.gateway)
        return (
            self.destination.version,
            self.table,
            *_network_key(self.destination),
            self.metric,
            _TYPE_ORDER[self.type],
            self.device,
            gateway,
            *(int(hop.gateway) for hop in self.hops),
        )

    def render(self) -> str:
        """As `ip route add` takes it, after the family."""
        prefix = "" if self.type is RouteType.UNICAST else f"{self.type} "
        words = [f"-{self.destination.version} {prefix}{prefix_text(self.destination)}"]
        if self.gateway is not None:
            words.append(f"via {address_text(self.gateway)}")
        if self.device and not self.hops:
            words.append(f"dev {self.device}")
        if self.gateway is not None:
            words.append("onlink")
        words.append(f"table {self.table} protocol {ROUTE_PROTOCOL}")
        if self.metric:
            words.append(f"metric {self.metric}")
        words += [hop.render(self.device) for hop in self.hops]
        return " ".join(words)


@dataclass(frozen=True, slots=True)
class VlanLink:
    """A VLAN device that the policy asks for."""

    name: str
    parent: str
    vlan_id: int
    protocol: VlanProtocol

    def render(self) -> str:
        proto = {VlanProtocol.DOT1Q: "802.1Q", VlanProtocol.DOT1AD: "802.1ad"}[self.protocol]
        return f"link {self.parent} name {self.name} type vlan proto {proto} id {self.vlan_id}"


@dataclass(frozen=True, slots=True)
class VrfLink:
    """A VRF device that the policy names.

    Attributes:
        is_made: we make it where it is missing; else it is somebody else's.
    """

    name: str
    table: int
    is_made: bool

    def render(self) -> str:
        return f"link name {self.name} type vrf table {self.table}" + (
            "" if self.is_made else " (somebody makes it)"
        )


@dataclass(frozen=True, slots=True, order=True)
class Slave:
    """A device that belongs to a VRF."""

    device: str
    vrf: str

    def render(self) -> str:
        return f"link {self.device} master {self.vrf}"


@dataclass(frozen=True, slots=True, order=True)
class Sysctl:
    """One setting; the key uses slashes, because device names hold dots (`net/ipv4/conf/eth0.100/...`)."""

    key: str
    value: str

    def render(self) -> str:
        return f"{self.key}={self.value}"


def _network_key(network: IpNetwork | None) -> tuple[int, int]:
    return (-1, -1) if network is None else (int(network.network_address), network.prefixlen)
