# SPDX-License-Identifier: Apache-2.0
"""The policy: what an operator writes, as frozen models with every default filled in.

A model says what a value may be on its own. Rules that need two places of the file (overlapping
VIPs, a mark outside the mask, ...) are in `crosscheck`, because they have positions to report.
"""

from __future__ import annotations

import enum
import functools
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StrictBool, model_validator

from datapath.plan.ingress import IpNetwork, OtherCheck, VipCheck
from datapath.policy.addresses import IpAddress, RefusedError, collapse, family_set, shown
from datapath.policy.base import PolicyModel
from datapath.policy.egress import EGRESS_MAX, Egress
from datapath.policy.fields import (
    Addresses,
    Integer,
    InterfaceName,
    Mark,
    Mask,
    Name,
    Prefix,
    Table,
    Vip,
    Zone,
)
from datapath.policy.gateways import Gateway, GatewayCheck, GatewayEntry, GatewayMode, check_choice
from datapath.policy.marks import PROFILES, REFUSED_PROFILES, MarkProfile
from datapath.policy.probe import PROBES_MAX, Probe
from datapath.policy.vlan import VlanDevice
from datapath.policy.vrf import Vrf

#: Our ip rules lie in ``priority``..``priority + RULE_BLOCK_SIZE - 1``.
RULE_BLOCK_SIZE = 4096

#: The kernel's own rule for the main table: everything of ours comes before it.
MAIN_RULE_PRIORITY = 32766

RULE_PRIORITY_MAX = MAIN_RULE_PRIORITY - RULE_BLOCK_SIZE

#: What the largest mark mask profile and the rule block have room for.
NETWORKS_MAX = 4095


class Steering(enum.StrEnum):
    """How replies are sent to their network."""

    RULES = "rules"
    DIRECT = "direct"


class Backend(enum.StrEnum):
    """What marks and checks packets as they enter."""

    AUTO = "auto"
    EBPF = "ebpf"
    NFT = "nft"


class ReturnPath(enum.StrEnum):
    """How replies find the way back."""

    CONNTRACK = "conntrack"
    SOURCE = "source"
    NONE = "none"


class Routes(enum.StrEnum):
    """Who fills a network's routing table."""

    OWN = "own"
    EXTERNAL = "external"


class Track(enum.StrEnum):
    """Which network a connection belongs to when its packets enter by several."""

    FIRST = "first"
    LAST = "last"


def _check_version(value: object) -> object:
    # Literal[1] alone would take `true` and 1.0 as well.
    if type(value) is not int or value != 1:
        raise RefusedError(f"{shown(value)} is not a version", "write `version: 1`, the number")
    return value


def _check_profile(value: object) -> object:
    if isinstance(value, str) and value in REFUSED_PROFILES:
        raise RefusedError(
            REFUSED_PROFILES[value],
            "use this program where kube-proxy serves the VIPs, with one of the other profiles",
        )
    return value


class Node(PolicyModel):
    """The node that the policy is for."""

    internal: tuple[Prefix, ...] = Field(
        default=(),
        description="Prefixes of pods and services: never a valid source on a network.",
    )


class Marks(PolicyModel):
    """Which bits of the packet mark and the connection mark are ours. `profile` or `mask`, not both."""

    model_config = ConfigDict(json_schema_extra={"not": {"required": ["profile", "mask"]}})

    profile: Annotated[MarkProfile, BeforeValidator(_check_profile)] | None = Field(
        default=None, description="A mask by the name of the agent to live beside; see the table of profiles."
    )
    mask: Mask | None = Field(
        default=None, description="The mask itself: 1 to 16 bits, gaps allowed, for example 0x0fff0000."
    )

    @model_validator(mode="after")
    def _exclusive(self) -> Marks:
        if self.profile is not None and self.mask is not None:
            raise RefusedError("`profile` and `mask` are both set", "keep one of them")
        return self

    @property
    def effective_mask(self) -> int:
        """The mask in use: 32 bits wide, at least one bit, at most 16."""
        return self.mask if self.mask is not None else PROFILES[self.profile or MarkProfile.DEFAULT].mask


class Rules(PolicyModel):
    """Where our ip rules are."""

    priority: Integer = Field(
        default=10000,
        ge=1,
        le=RULE_PRIORITY_MAX,
        description=f"First priority of our block of ip rules, which is {RULE_BLOCK_SIZE} wide "
        "and ends before the kernel's rule for the main table (32766).",
    )
    leak_priority: Integer = Field(
        default=900,
        ge=1,
        le=RULE_PRIORITY_MAX,
        description="Priority of the rules that let clients of VRFs reach pods and services: before the kernel's "
        "rule for VRFs (1000).",
    )


class ReversePath(PolicyModel):
    """Which sources may enter by this network."""

    vips: VipCheck = Field(
        default=VipCheck.FEASIBLE,
        description="Packets to the VIPs: `feasible` (the network's own table has a route back), `strict` "
        "(the node's tables lead back out of this network) or `off`.",
    )
    other: OtherCheck = Field(
        default=OtherCheck.STRICT,
        description="All other packets: `strict` (the main table leads back by this device), `loose` (any "
        "route back) or `off`.",
    )
    allow: tuple[Prefix, ...] = Field(
        default=(),
        description="Sources to let in though they are refused by default; the longest prefix decides.",
    )
    deny: tuple[Prefix, ...] = Field(
        default=(), description="Sources to refuse besides the default ones; the longest prefix decides."
    )


class Network(PolicyModel):
    """A network by which clients reach VIPs of this node: exactly one of `vlan` and `interface`."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["vlan"]}, {"required": ["interface"]}]}
    )

    name: Name = Field(
        description="Name in comments, counters and logs; unique. Lower-case letters, digits and hyphens."
    )
    vlan: VlanDevice | None = Field(default=None, description="A VLAN device, made if it does not exist.")
    interface: InterfaceName | None = Field(default=None, description="A device that someone else makes.")
    vips: tuple[Vip, ...] = Field(
        min_length=1,
        description="Addresses served here: addresses, prefixes or ranges `first-last`, IPv4 and IPv6.",
    )
    gateway: Addresses = Field(
        default=(),
        description="The router that replies go to; a list for one per family. IPv6 may be link-local. "
        "Default: none, clients are on the network itself.",
    )
    gateways: tuple[GatewayEntry, ...] = Field(
        default=(),
        description="Several routers instead of `gateway`, each an address or a mapping; "
        "their order is their priority.",
    )
    gateway_mode: GatewayMode = Field(
        default=GatewayMode.ECMP,
        description="`ecmp` (all of `gateways` that are up share the flows) or `active_standby` (the first that is up "
        "gets all of them).",
    )
    gateway_check: GatewayCheck = Field(
        default=GatewayCheck(), description="How the daemon finds out which of `gateways` are up."
    )
    on_link: tuple[Prefix, ...] = Field(
        default=(),
        description="Prefixes reachable directly on the network. "
        "Default: the VIP prefixes that hold a gateway.",
    )
    routes: Routes = Field(
        default=Routes.OWN,
        description="Who fills the network's routing table: `own` (we do, from `gateway` and `on_link`) or "
        "`external` (a routing daemon such as FRR or BIRD; needs `table`, takes no `gateway`).",
    )
    return_path: ReturnPath = Field(
        default=ReturnPath.CONNTRACK,
        description="`conntrack` (replies follow their connection), `source` (replies are recognised by "
        "their source address when they are routed: local sockets and IPVS only) or `none`.",
    )
    reverse_path: ReversePath = Field(default=ReversePath(), description="Which sources may enter.")
    table: Table | None = Field(
        default=None, description="Routing table of this network. Default: one is chosen and kept."
    )
    mark: Mark | None = Field(
        default=None, description="Fwmark of this network, inside the mask. Default: one is chosen and kept."
    )
    vrf: Vrf | None = Field(default=None, description="Put the device into this VRF and route by its table.")
    isolate_clients: StrictBool = Field(
        default=False,
        description="Track this network's connections apart: the same client address may come "
        "from two networks, and the same VIP may be served on both.",
    )
    zone: Zone | None = Field(
        default=None,
        description="Connection-tracking zone of an isolated network. Default: one is chosen and kept.",
    )
    strict_arp: StrictBool = Field(
        default=False,
        description="Answer ARP only for addresses of the device (`arp_ignore=1`, `arp_announce=2`).",
    )
    steering: Steering | None = Field(
        default=None, description="Overrides the file's `steering` for this network."
    )
    accelerate: StrictBool | None = Field(
        default=None, description="Overrides the file's `accelerate` for this network."
    )
    track: Track = Field(
        default=Track.FIRST,
        description="`first`: a connection keeps the network it came in by; "
        "`last`: it follows its newest packet.",
    )

    @model_validator(mode="after")
    def _one_device(self) -> Network:
        if self.vlan is None and self.interface is None:
            raise RefusedError(
                f"network {shown(self.name)} has no device",
                "add `vlan: {parent: eth0, id: 100}`, or `interface:` for a device someone else makes",
            )
        if self.vlan is not None and self.interface is not None:
            raise RefusedError(
                f"network {shown(self.name)} has both `vlan` and `interface`", "keep one of them"
            )
        check_choice(self)
        return self

    @functools.cached_property
    def device(self) -> str:
        """Name of the device on which the IP stack sees this network's packets."""
        return self.vlan.name if self.vlan is not None else self.interface or ""

    @functools.cached_property
    def vip_prefixes(self) -> tuple[IpNetwork, ...]:
        """The VIPs as the smallest set of prefixes, IPv4 first, sorted."""
        return collapse(prefix for vip in self.vips for prefix in vip.prefixes())

    @functools.cached_property
    def vip_families(self) -> frozenset[int]:
        """4, 6 or both."""
        return family_set(*sorted({vip.version for vip in self.vips}))

    @functools.cached_property
    def effective_on_link(self) -> tuple[IpNetwork, ...]:
        """`on_link`, or else the VIP prefixes as written that hold a gateway; smallest set, sorted."""
        if self.on_link:
            return collapse(self.on_link)
        found = collapse(
            prefix
            for vip in self.vips
            if not vip.is_single
            and (prefix := vip.prefix)
            and any(address in vip for address in self.gateway_addresses)
        )
        # Most are the VIPs' own: one object instead of two, of thousands.
        same = {prefix: prefix for prefix in self.vip_prefixes}
        return tuple(same.get(prefix, prefix) for prefix in found)

    @functools.cached_property
    def link_prefixes(self) -> tuple[IpNetwork, ...]:
        """Where clients of a VRF are neighbours: `effective_on_link`, or the VIPs' prefixes in a family without any."""
        known = self.effective_on_link
        if self.has_external_routes:
            return known
        reached = {address.version for address in self.gateway_addresses} | {
            prefix.version for prefix in known
        }
        others = (vip.prefix for vip in self.vips if not vip.is_single and vip.version not in reached)
        return collapse((*known, *(prefix for prefix in others if prefix)))

    @functools.cached_property
    def gateway_addresses(self) -> tuple[IpAddress, ...]:
        """Of `gateway` or `gateways`, in the order of the file."""
        return self.gateway or tuple(gateway.address for gateway in self.gateways)

    def has_gateway(self, family: int) -> bool:
        """Whether there is one of a family (4 or 6)."""
        return any(address.version == family for address in self.gateway_addresses)

    def gateways_of(self, family: int) -> tuple[Gateway, ...]:
        """The gateways of a family, whichever key names them."""
        gateways = self.gateways or tuple(Gateway(address=address) for address in self.gateway)
        return tuple(gateway for gateway in gateways if gateway.address.version == family)

    @property
    def has_external_routes(self) -> bool:
        """Others know the next hops of replies; there is no gateway."""
        return self.routes is Routes.EXTERNAL

    def is_routed(self, family: int) -> bool:
        """Replies of a family go to a router, so they need a table of their own."""
        return self.has_external_routes or self.vrf is not None or self.has_gateway(family)

    def carries_egress(self, family: int) -> bool:
        """Connections of a family that are opened from inside can leave by it."""
        return family in self.vip_families and self.is_routed(family)

    @property
    def needs_mark(self) -> bool:
        """Replies are steered by a fwmark."""
        is_routed = bool(self.gateway_addresses) or self.has_external_routes or self.vrf is not None
        return self.return_path is ReturnPath.CONNTRACK and is_routed


class Policy(PolicyModel):
    """A whole policy file."""

    version: Annotated[Literal[1], BeforeValidator(_check_version)] = Field(
        description="Version of the format: 1."
    )
    node: Node = Field(default=Node(), description="The node: what is inside it.")
    marks: Marks = Field(default=Marks(), description="Which mark bits are ours.")
    rules: Rules = Field(default=Rules(), description="Where our ip rules are.")
    steering: Steering = Field(
        default=Steering.RULES,
        description="`rules` (fwmarks, ip rules and routing tables: complete) or `direct` (answers are "
        "redirected where they would leave by the default route: fastest, with limits).",
    )
    backend: Backend = Field(
        default=Backend.AUTO,
        description="What marks and checks packets as they enter: `auto`, `ebpf` or `nft`.",
    )
    accelerate: StrictBool = Field(
        default=False,
        description="Carry established TCP and UDP connections of the networks past the hooks of netfilter, by a "
        "flowtable (`nf_flow_table`), where they enter by a device that it covers.",
    )
    networks: tuple[Network, ...] = Field(
        min_length=1, max_length=NETWORKS_MAX, description="The networks, in any order."
    )
    egress: tuple[Egress, ...] = Field(
        default=(),
        max_length=EGRESS_MAX,
        description="Connections that are opened from inside; the first entry that matches decides.",
    )
    probes: tuple[Probe, ...] = Field(
        default=(),
        max_length=PROBES_MAX,
        description="What must work after a change, or the change is undone.",
    )

    def steering_of(self, network: Network) -> Steering:
        """How a network's replies are sent."""
        return network.steering or self.steering

    def accelerates(self, network: Network) -> bool:
        """Whether a network's established connections are to pass the hooks by."""
        return self.accelerate if network.accelerate is None else network.accelerate
