# SPDX-License-Identifier: Apache-2.0
"""The operations that a change consists of. Each is one act of the kernel.

The way back is no list of inverses: it is the reconciliation from whatever was reached to the plan in force before.
`kernel/executor.py` carries them out; everything here is only said.
"""

from __future__ import annotations

from dataclasses import dataclass

from datapath.plan.ingress import IngressProgram
from datapath.plan.model import MarkChange, ZoneChange
from datapath.plan.rtnl import FibRule, Route, Slave, VlanLink, VrfLink
from datapath.plan.steering import SteeringProgram


@dataclass(frozen=True, slots=True)
class SetSysctl:
    """Write one sysctl; `old` is what it is before."""

    key: str
    new: str
    old: str

    def describe(self) -> str:
        return f"set {self.key} from {self.old} to {self.new}"


@dataclass(frozen=True, slots=True)
class AddLink:
    """Create a VLAN or VRF device and set it up."""

    link: VlanLink | VrfLink

    def describe(self) -> str:
        if isinstance(self.link, VrfLink):
            return f"add VRF {self.link.name} (table {self.link.table})"
        return f"add VLAN device {self.link.name} (VLAN {self.link.vlan_id} on {self.link.parent})"


@dataclass(frozen=True, slots=True)
class DeleteLink:
    """Remove a VLAN or VRF device that we created."""

    link: VlanLink | VrfLink

    def describe(self) -> str:
        if isinstance(self.link, VrfLink):
            return f"delete VRF {self.link.name}"
        return f"delete VLAN device {self.link.name}"


@dataclass(frozen=True, slots=True)
class SetLinkUp:
    """Set a device of ours up."""

    name: str

    def describe(self) -> str:
        return f"set {self.name} up"


@dataclass(frozen=True, slots=True)
class Enslave:
    """Put a device into a VRF. The kernel sets it down and up for that: its routes are lost, in every table."""

    slave: Slave

    def describe(self) -> str:
        return f"put {self.slave.device} into VRF {self.slave.vrf}"


@dataclass(frozen=True, slots=True)
class Release:
    """Take a device out of a VRF that we put it into; as `Enslave`, it costs its routes."""

    slave: Slave

    def describe(self) -> str:
        return f"take {self.slave.device} out of VRF {self.slave.vrf}"


@dataclass(frozen=True, slots=True)
class AddRoute:
    """Add a route, or replace the one with the same key in one act."""

    route: Route
    replaces: Route | None = None

    def describe(self) -> str:
        verb = "replace" if self.replaces else "add"
        return f"{verb} route: {self.route.render()}"


@dataclass(frozen=True, slots=True)
class DeleteRoute:
    """Delete a route."""

    route: Route

    def describe(self) -> str:
        return f"delete route: {self.route.render()}"


@dataclass(frozen=True, slots=True)
class AddRule:
    """Add an ip rule."""

    rule: FibRule

    def describe(self) -> str:
        return f"add rule: {self.rule.render()}"


@dataclass(frozen=True, slots=True)
class DeleteRule:
    """Delete an ip rule by its full tuple."""

    rule: FibRule

    def describe(self) -> str:
        return f"delete rule: {self.rule.render()}"


@dataclass(frozen=True, slots=True)
class NftTransaction:
    """One nft file, all or nothing.

    Attributes:
        follows: it builds on an earlier transaction of the same change, so it cannot be checked before that one.
    """

    text: str
    follows: bool = False

    def describe(self) -> str:
        commands = self.text.count("\n")
        return f"nft transaction of {commands} command{'s' if commands != 1 else ''}"


@dataclass(frozen=True, slots=True)
class SyncIngress:
    """Bring the eBPF program, its maps and its attachments to the desired state.

    Attributes:
        clsact: devices whose clsact qdisc we made and need no more: it goes if nobody else uses it.
        filtered: with tcx, the devices that get or keep a filter all the same.
        stays: no other program need be loaded.
    """

    program: IngressProgram
    clsact: frozenset[str] = frozenset()
    filtered: frozenset[str] = frozenset()
    stays: bool = False

    def describe(self) -> str:
        devices = ", ".join(self.program.attachments) or "no device"
        return f"eBPF program for {len(self.program.networks)} network(s) on {devices}"


@dataclass(frozen=True, slots=True)
class ExtendSteering:
    """Attach and fill the egress program; what it knew before stays until `TrimSteering`."""

    program: SteeringProgram

    def describe(self) -> str:
        devices = ", ".join(self.program.attachments)
        return f"egress program for {len(self.program.networks)} network(s) on {devices}"


@dataclass(frozen=True, slots=True)
class TrimSteering:
    """Take away from the egress program what is not desired; without networks, the program itself.

    Attributes:
        clsact: devices whose clsact qdisc we made and need no more: it goes if nobody else uses it.
    """

    program: SteeringProgram
    clsact: frozenset[str] = frozenset()

    def describe(self) -> str:
        if not self.program.networks:
            return "detach the egress program"
        return f"egress program only for {len(self.program.networks)} network(s)"


@dataclass(frozen=True, slots=True)
class ForgetConnections:
    """Delete the connection-tracking entries that carry a mark which is free again."""

    fwmark: int
    fwmask: int

    def describe(self) -> str:
        return f"delete conntrack entries with mark {self.fwmark:#010x}/{self.fwmask:#010x}"


@dataclass(frozen=True, slots=True)
class TranslateConnections:
    """Give the connection-tracking entries of a network its new mark."""

    change: MarkChange

    def describe(self) -> str:
        change = self.change
        return (
            f"carry connections of {change.name} from mark {change.old:#010x}/{change.old_mask:#010x}"
            f" to {change.new:#010x}/{change.new_mask:#010x}"
        )


@dataclass(frozen=True, slots=True)
class MoveConnections:
    """Put the connection-tracking entries of a network into another zone."""

    change: ZoneChange

    def describe(self) -> str:
        change = self.change
        return f"move connections of {change.name} from conntrack zone {change.old} to {change.new}"


Step = (
    SetSysctl
    | AddLink
    | DeleteLink
    | SetLinkUp
    | Enslave
    | Release
    | AddRoute
    | DeleteRoute
    | AddRule
    | DeleteRule
    | NftTransaction
    | SyncIngress
    | ExtendSteering
    | TrimSteering
    | ForgetConnections
    | TranslateConnections
    | MoveConnections
)

_KINDS: dict[type[Step], str] = {
    AddLink: "link",
    DeleteLink: "link",
    SetLinkUp: "link",
    Enslave: "link",
    Release: "link",
    AddRoute: "route",
    DeleteRoute: "route",
    AddRule: "rule",
    DeleteRule: "rule",
    NftTransaction: "nft",
    SetSysctl: "sysctl",
    SyncIngress: "tc",
    ExtendSteering: "tc",
    TrimSteering: "tc",
}


def kind_of(step: Step) -> str:
    """What sort of object a step repairs, as metrics and logs name it."""
    return _KINDS.get(type(step), "other")
