# SPDX-License-Identifier: Apache-2.0
"""The actual state, in the same nouns as the plan. `kernel/` fills this in; nothing here reads a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from datapath.plan.nft import BaseChain
from datapath.plan.rtnl import Family, FibRule, Route, Slave
from datapath.plan.tc import Hook


@dataclass(frozen=True, slots=True)
class ActualChain:
    """A chain of our table as the kernel has it.

    Attributes:
        digests: one per rule, in order; None for a rule that we did not write.
        base: None for a chain that is only jumped to.
    """

    digests: tuple[str | None, ...]
    base: BaseChain | None = None


@dataclass(frozen=True, slots=True)
class ActualMap:
    """A map or set of our table as the kernel has it."""

    key_type: str
    value_type: str
    elements: Mapping[str, str]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ActualTable:
    """Our nftables table; `flowtables` are devices by name."""

    chains: Mapping[str, ActualChain] = field(default_factory=dict)
    maps: Mapping[str, ActualMap] = field(default_factory=dict)
    counters: frozenset[str] = frozenset()
    flowtables: Mapping[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ActualLink:
    """A network device. `addresses` are not here: the plan never touches them.

    Attributes:
        port_of: the bridge, bond or team that takes its packets; empty where the IP stack gets them.
        mtu: 0 where nobody looked.
        vrf: that it belongs to; empty where it is in none.
        vrf_table: of a VRF itself.
    """

    name: str
    up: bool
    kind: str = ""
    parent: str = ""
    vlan_id: int = 0
    vlan_protocol: int = 0
    port_of: str = ""
    mtu: int = 0
    vrf: str = ""
    vrf_table: int = 0


@dataclass(frozen=True, slots=True)
class ForeignRule:
    """An ip rule of somebody else.

    Attributes:
        text: as ip(8) would show it, for messages.
        protocol: FRA_PROTOCOL, which often tells the owner.
        is_l3mdev: it looks up the table of the VRF that a packet is in.
    """

    family: Family
    priority: int
    fwmark: int
    fwmask: int
    table: int
    protocol: int
    text: str
    is_l3mdev: bool = False


@dataclass(frozen=True, slots=True)
class ForeignMark:
    """A rule of somebody else that writes the packet or connection mark.

    Attributes:
        where: table and chain, for messages.
        chosen: bits that the rule sets to one.
        written: bits that it overwrites at all.
    """

    where: str
    chosen: int
    written: int


@dataclass(frozen=True, slots=True)
class Saved:
    """A sysctl that we changed: what it was, and what we made of it."""

    original: str
    ours: str


@dataclass(frozen=True, slots=True)
class Record:
    """What only memory can tell: kept in the state directory.

    Attributes:
        sysctls: by key.
        links: devices that we created.
        slaves: devices that we put into a VRF; while one is moved, it may be in either.
        clsact: devices on which we created the clsact qdisc.
    """

    sysctls: Mapping[str, Saved] = field(default_factory=dict)
    links: frozenset[str] = frozenset()
    clsact: frozenset[str] = frozenset()
    slaves: frozenset[Slave] = frozenset()

    def also(self, later: Record) -> Record:
        """This and what came to it: of a sysctl, the later value to put back, and every value of ours."""
        sysctls = dict(self.sysctls)
        for key, entry in later.sysctls.items():
            known = sysctls[key].ours.split() if key in sysctls else []
            ours = dict.fromkeys((*known, *entry.ours.split()))
            sysctls[key] = Saved(entry.original, " ".join(ours))
        return Record(
            sysctls, self.links | later.links, self.clsact | later.clsact, self.slaves | later.slaves
        )


@dataclass(frozen=True, slots=True)
class ActualIngress:
    """The eBPF side, compared by `kernel/` because only it knows ifindexes.

    Attributes:
        attached: devices that carry our program.
        differences: what is not as desired, in words; empty where all is.
        clsact: devices that have a clsact qdisc, whoever made it.
        foreign: devices where somebody else sits at our filter's priority and handle.
        hook: how this kernel takes the program; with tcx no qdisc is needed.
        ahead: device and name of each program of others that sees packets before ours.
        filtered: with tcx, the devices that have a filter all the same and keep it.
        taken: with tcx, the devices where a filter of others leaves no place for ours.
        stays: the program that runs can serve as it is; only maps or attachments differ, if anything.
    """

    attached: frozenset[str] = frozenset()
    differences: tuple[str, ...] = ()
    clsact: frozenset[str] = frozenset()
    foreign: frozenset[str] = frozenset()
    hook: Hook = Hook.CLSACT
    ahead: tuple[tuple[str, str], ...] = ()
    filtered: frozenset[str] = frozenset()
    taken: frozenset[str] = frozenset()
    stays: bool = False


@dataclass(frozen=True, slots=True)
class ActualSteering:
    """The egress program, compared by `kernel/` as `ActualIngress` is.

    Attributes:
        attached: devices that carry our program at their egress.
        missing: what is desired and not there, in words.
        surplus: what is there and not desired, in words.
        clsact, foreign, hook, ahead: as in `ActualIngress`.
    """

    attached: frozenset[str] = frozenset()
    missing: tuple[str, ...] = ()
    surplus: tuple[str, ...] = ()
    clsact: frozenset[str] = frozenset()
    foreign: frozenset[str] = frozenset()
    hook: Hook = Hook.CLSACT
    ahead: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Actual:
    """One namespace at one moment.

    Attributes:
        fwmark_mask: that our table was made for; 0 where it does not say.
        rules: ours, by protocol id.
        routes: ours, by protocol id.
        foreign_tables: routing tables with routes of others, with one example each.
        foreign_marks: who writes which mark bits; only looked at when a mask is about to be claimed.
        sysctls: current values of the keys that we may have to touch.
        stranded: by device that is about to be put into a VRF: what of others would be lost, in words.
    """

    table: ActualTable | None = None
    fwmark_mask: int = 0
    rules: frozenset[FibRule] = frozenset()
    routes: frozenset[Route] = frozenset()
    foreign_rules: tuple[ForeignRule, ...] = ()
    foreign_tables: Mapping[int, str] = field(default_factory=dict)
    foreign_marks: tuple[ForeignMark, ...] = ()
    links: Mapping[str, ActualLink] = field(default_factory=dict)
    sysctls: Mapping[str, str] = field(default_factory=dict)
    ingress: ActualIngress = ActualIngress()
    steering: ActualSteering = ActualSteering()
    stranded: Mapping[str, str] = field(default_factory=dict)
