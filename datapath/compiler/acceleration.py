# SPDX-License-Identifier: Apache-2.0
"""`accelerate`: a flowtable of our own, for established connections of our networks alone.

What is taken over is looked up both ways with the marks that `compiler/flowtables.py` puts on: ours is one of those
flowtables. What is not taken over goes on as without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from datapath.compiler.context import Context, NetworkContext
from datapath.errors import Problem
from datapath.facts import LinkFacts
from datapath.plan.model import Note, NoteLevel
from datapath.plan.nft import BaseChain, ChainType, Hook, NftChain, NftFlowtable, NftMap, NftRule

#: Behind everybody's filters (0, firewalld 10): what one of them refuses is not taken over.
PRIORITY = 300
FLOWTABLE = "fast"
_MARKS = "accelerated"
_CARRY = "carry"
_ORIGIN = "networks[*].accelerate"
#: They look their own way up by the mark of the packet inside, and nobody is left to take it off.
_TUNNELS = '{ "geneve", "vxlan" }'


@dataclass(frozen=True, slots=True)
class Acceleration:
    """What the table gets; empty where nothing is accelerated."""

    chains: tuple[NftChain, ...] = ()
    maps: tuple[NftMap, ...] = ()
    flowtables: tuple[NftFlowtable, ...] = ()


NO_ACCELERATION = Acceleration()


def accelerated(context: Context) -> list[NetworkContext]:
    """Networks whose established connections are carried past the hooks on this host."""
    return [] if context.facts.flowtables_refused else _wanted(context)


def _wanted(context: Context) -> list[NetworkContext]:
    return [n for n in context.networks if context.policy.accelerates(n.network) and n.is_marked]


def emit_acceleration(context: Context, checks: tuple[NftChain, ...]) -> Acceleration:
    """The flowtable, and who may use it.

    Args:
        context: with the ids.
        checks: chains that look at packets behind the flowtable's hook (`backend: nft`): flows that it carries do
            not meet them. Where these change, so does its name: what the old one carried is looked at again.
    """
    networks = accelerated(context)
    if not networks:
        return NO_ACCELERATION
    text = "\n".join(rule.text for chain in checks for rule in chain.rules)
    name = f"{FLOWTABLE}-{hashlib.sha256(text.encode()).hexdigest()[:8]}" if checks else FLOWTABLE
    return Acceleration(
        _chains(context, name),
        (_marks(context, networks),),
        (NftFlowtable(name, _devices(context, networks)),),
    )


def _chains(context: Context, flowtable: str) -> tuple[NftChain, ...]:
    return (
        NftChain(
            "accelerate",
            (
                NftRule(
                    f"ct mark & {context.mask:#010x} @{_MARKS} ct state established meta l4proto {{ tcp, udp }}"
                    f" goto {_CARRY}",
                    f"{_ORIGIN} established connections",
                ),
            ),
            BaseChain(ChainType.FILTER, Hook.FORWARD, PRIORITY),
        ),
        NftChain(
            _CARRY,
            (
                # One rule each: a device without a kind (a real one) ends the rule.
                NftRule(f"meta iifkind {_TUNNELS} return", f"{_ORIGIN} not from a tunnel"),
                NftRule(f"meta oifkind {_TUNNELS} return", f"{_ORIGIN} not into a tunnel"),
                NftRule(f"flow add @{flowtable}", f"{_ORIGIN} past the hooks from now on"),
            ),
        ),
    )


def _marks(context: Context, networks: list[NetworkContext]) -> NftMap:
    """Of requests that came in by these networks, and of connections that leave by them."""
    marks = [network.ids.fwmark for network in networks]
    marks += [context.egress_marks[n.name] for n in networks if n.name in context.egress_marks]
    return NftMap(_MARKS, "mark", "", tuple((f"{mark:#010x}", "") for mark in sorted(marks)))


def _devices(context: Context, networks: list[NetworkContext]) -> tuple[str, ...]:
    """By which requests come in, and answers: the default routes' for pods on other nodes, bridges of pods here."""
    names = {name for devices in context.facts.default_devices.values() for name in devices}
    links = {link.name: link for link in context.facts.links}
    for network in networks:
        names |= {network.device, network.point.ifname}
        if network.link is not None and network.link.kind == "vlan" and network.link.parent in links:
            names.add(network.link.parent)
    names |= {link.name for link in context.facts.links if _is_bridge_of_pods(context, link)}
    return tuple(sorted(names))


def _is_bridge_of_pods(context: Context, link: LinkFacts) -> bool:
    return link.kind == "bridge" and any(
        address.ip in prefix for address in link.addresses for prefix in context.policy.node.internal
    )


def find_refused(context: Context) -> tuple[Problem, ...]:
    """That this kernel has no flowtables."""
    refused, wanted = context.facts.flowtables_refused, _wanted(context)
    if not refused or not wanted:
        return ()
    own = wanted[0].network.accelerate is not None
    return (
        Problem(
            ("networks", wanted[0].position, "accelerate") if own else ("accelerate",),
            f"this kernel has no flowtables: {refused}",
            "load nf_flow_table, nf_flow_table_inet and nft_flow_offload (CONFIG_NF_FLOW_TABLE), or remove"
            " `accelerate`: everything else works without",
        ),
    )


def acceleration_notes(context: Context, table_flowtables: tuple[NftFlowtable, ...]) -> Iterator[Note]:
    """What a reviewer should know."""
    for problem in find_refused(context):
        yield Note(NoteLevel.WARNING, "accelerate", f"{problem.message}; connections go the usual way")
    for flowtable in table_flowtables:
        yield Note(
            NoteLevel.INFO,
            "accelerate",
            "established TCP and UDP connections pass the hooks by, in packets that enter by"
            f" {', '.join(flowtable.devices)}",
        )
