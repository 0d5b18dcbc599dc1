# SPDX-License-Identifier: Apache-2.0
"""The plan: everything that one policy wants of one node, as one printable value."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from functools import cached_property

from datapath.errors import Problem
from datapath.plan.egress import EgressEntry
from datapath.plan.gateways import GatewayCheck
from datapath.plan.ingress import IngressProgram
from datapath.plan.nft import NftTable
from datapath.plan.rtnl import FibRule, Route, Slave, Sysctl, VlanLink, VrfLink
from datapath.plan.steering import SteeringProgram


@dataclass(frozen=True, slots=True, order=True)
class NetworkIds:
    """The numbers that stand for one network in the kernel. They never move while it exists.

    Attributes:
        fwmark: bits inside the policy's mask; 0 where the network needs none.
        table: routing table; 0 where it needs none.
        slot: index of its counters and prefixes in the eBPF maps; 0 where no packet is looked at.
        zone: of connection tracking, for the original direction; 0, which is everybody's, where clients are not
            isolated.
        in_vrf: the table is a VRF's, and is left behind when the network leaves it.
    """

    name: str
    fwmark: int = 0
    table: int = 0
    slot: int = 0
    zone: int = 0
    in_vrf: bool = False

    @property
    def own_table(self) -> int:
        """The table that goes with the network, wherever its device goes; 0 where it has none."""
        return 0 if self.in_vrf else self.table


class Backend(enum.StrEnum):
    """What looks at packets as they enter."""

    EBPF = "ebpf"
    NFT = "nft"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class MarkChange:
    """A network that stays and gets another mark.

    Attributes:
        old: value under `old_mask`.
        new: value under `new_mask`.
    """

    name: str
    old: int
    old_mask: int
    new: int
    new_mask: int


@dataclass(frozen=True, slots=True)
class ZoneChange:
    """A network that stays and whose connections move to another zone.

    Attributes:
        device: that its requests enter by.
        fwmark: of its connections, under `mask`, when they are moved.
    """

    name: str
    device: str
    fwmark: int
    mask: int
    old: int
    new: int


class NoteLevel(enum.StrEnum):
    """How much a note matters to a reviewer."""

    INFO = "info"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Note:
    """What a reviewer should know that the objects do not say by themselves."""

    level: NoteLevel
    element: str
    text: str

    def render(self) -> str:
        return f"{self.level}: {self.element}: {self.text}"


@dataclass(frozen=True)
class Plan:
    """The desired state. All tuples are sorted; equal input gives equal text.

    Attributes:
        fwmark_mask: the bits of packet and connection marks that are ours.
        rp_filter_exempt: devices whose kernel reverse-path filter must be off; every other device keeps
            its present effective value, whatever that is on this node.
        external_tables: routing tables that our rules look up and that others fill.
        table: our nftables table, or None where nothing needs one.
        ingress: what is looked at as packets enter, whichever backend does it.
        mark_changes: networks whose connections are to be carried over from another mark; nothing on a node
            that is as the plan says.
        zone_changes: networks whose connections are to be carried over from another zone, likewise.
        transition: the table during such a change, with the old zones; None where no mark and no zone changes.
        holding: the table while connections move between zones: requests of their networks wait.
        steering: what sends answers to their network as they leave (`steering: direct`).
        checks: gateways that the daemon watches, in the order of the policy; nothing of the kernel's.
        egress: connections that leave by a network, in the order of the policy; the table does it.
        refusals: what this host, as it is now, cannot serve of the policy. A person's apply refuses; the daemon
            serves the rest and waits for the host to change.
        backend: who does it; `backend_reason` says why where the policy left the choice.
    """

    fwmark_mask: int
    ids: tuple[NetworkIds, ...] = ()
    vrfs: tuple[VrfLink, ...] = ()
    links: tuple[VlanLink, ...] = ()
    slaves: tuple[Slave, ...] = ()
    sysctls: tuple[Sysctl, ...] = ()
    rp_filter_exempt: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    rules: tuple[FibRule, ...] = ()
    external_tables: tuple[int, ...] = ()
    table: NftTable | None = None
    ingress: IngressProgram = field(default_factory=lambda: IngressProgram(0))
    mark_changes: tuple[MarkChange, ...] = ()
    zone_changes: tuple[ZoneChange, ...] = ()
    transition: NftTable | None = None
    holding: NftTable | None = None
    steering: SteeringProgram = field(default_factory=SteeringProgram)
    checks: tuple[GatewayCheck, ...] = ()
    egress: tuple[EgressEntry, ...] = ()
    refusals: tuple[Problem, ...] = ()
    backend: Backend = Backend.NONE
    backend_reason: str = ""
    notes: tuple[Note, ...] = ()

    @cached_property
    def route_set(self) -> frozenset[Route]:
        """Kept, because a daemon compares one plan again and again, and hashing thousands of addresses is dear."""
        return frozenset(self.routes)

    @cached_property
    def rule_set(self) -> frozenset[FibRule]:
        """As `route_set`."""
        return frozenset(self.rules)

    @property
    def attached(self) -> IngressProgram:
        """What the eBPF program is to be filled with: nothing where nftables does its work."""
        return self.ingress if self.backend is Backend.EBPF else IngressProgram(self.fwmark_mask)

    @property
    def settled(self) -> Plan:
        """The plan once its change is over."""
        if not (self.mark_changes or self.zone_changes or self.transition or self.holding):
            # The same object: what was made of it, such as the set of thousands of routes, is not made again.
            return self
        return dataclasses.replace(self, mark_changes=(), zone_changes=(), transition=None, holding=None)

    @property
    def is_empty(self) -> bool:
        """Nothing is to be done on the node."""
        return (
            not (
                self.links or self.sysctls or self.rp_filter_exempt or self.routes or self.rules or self.table
            )
            and not self.slaves
            and not self.ingress.networks
            and not self.steering.networks
        )
