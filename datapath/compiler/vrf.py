# SPDX-License-Identifier: Apache-2.0
"""VRFs: which there must be, which devices belong to them, and what their clients reach of the main table.

What enters by a device of a VRF is looked up in the VRF's table by the kernel's own rule (l3mdev, 1000). Services and
pods are in main: rules before that one lead there, for the VRFs of the policy only. The last route of the VRF's table
refuses, in both families: without it a look-up would go on to main, and out of the VRF.
"""

from __future__ import annotations

from collections.abc import Iterator

from datapath.compiler.context import Context, NetworkContext
from datapath.plan.ingress import IpNetwork
from datapath.plan.model import Note, NoteLevel
from datapath.plan.rtnl import (
    TABLE_MAIN,
    Family,
    FibRule,
    RuleAction,
    Slave,
    Sysctl,
    VrfLink,
)
from datapath.policy.vrf import Vrf

#: Enslaving sets a device down and up, and down takes IPv6 addresses away, unless this says to keep them. It stays
#: while the device is in the VRF: deleting the VRF sets it down, too.
KEEP_ADDRESSES = "net/ipv6/conf/{}/keep_addr_on_down"
#: A listening socket that is bound to no device takes what entered by a VRF.
HOST_SOCKETS = ("net/ipv4/tcp_l3mdev_accept", "net/ipv4/udp_l3mdev_accept")


def _members(context: Context) -> Iterator[tuple[NetworkContext, Vrf]]:
    for network in context.networks:
        if network.network.vrf is not None:
            yield network, network.network.vrf


def emit_vrfs(context: Context) -> tuple[VrfLink, ...]:
    """Each VRF once, sorted; it is made where any of its networks says so."""
    made = {vrf.name for _, vrf in _members(context) if vrf.create}
    tables = {vrf.name: vrf.table for _, vrf in _members(context)}
    return tuple(VrfLink(name, tables[name], name in made) for name in sorted(tables))


def emit_slaves(context: Context) -> tuple[Slave, ...]:
    """Which device is in which VRF, sorted."""
    return tuple(sorted(Slave(network.device, vrf.name) for network, vrf in _members(context)))


def emit_vrf_sysctls(context: Context) -> Iterator[Sysctl]:
    """What enslaved devices need, and the sockets of the node."""
    for network, vrf in _members(context):
        yield Sysctl(KEEP_ADDRESSES.format(network.device), "1")
        if vrf.host_sockets:
            yield from (Sysctl(key, "1") for key in HOST_SOCKETS)


def emit_leaks(context: Context) -> Iterator[FibRule]:
    """From each VRF to pods, services, and what its policy adds.

    While it routes what came in, IPv4 takes the device itself for the one that the packet entered by
    (`ip_rcv_finish`), IPv6 the VRF (`ip6_route_input`).
    """
    leaks: dict[tuple[int, str], set[IpNetwork]] = {}
    for network, vrf in _members(context):
        for prefix in (*context.policy.node.internal, *vrf.leak):
            device = network.device if prefix.version == 4 else vrf.name
            leaks.setdefault((prefix.version, device), set()).add(prefix)
    for (version, device), prefixes in leaks.items():
        for prefix in prefixes:
            yield FibRule(
                Family(version),
                context.policy.rules.leak_priority,
                RuleAction.LOOKUP,
                TABLE_MAIN,
                destination=prefix,
                device=device,
            )


def vrf_notes(context: Context) -> Iterator[Note]:
    """What a reviewer should know about VRFs."""
    members = list(_members(context))
    if not members:
        return
    named = {vrf.name for _, vrf in members}
    if not context.policy.node.internal:
        yield Note(
            NoteLevel.WARNING,
            "node.internal",
            "is empty: from a VRF nothing of the main table can be reached, pods and services neither",
        )
    if any(vrf.host_sockets for _, vrf in members):
        others = sorted(
            link.name for link in context.facts.links if link.kind == "vrf" and link.name not in named
        )
        text = "sockets of the node that are bound to no device take connections from every VRF"
        if others:
            yield Note(NoteLevel.WARNING, "networks[*].vrf", f"{text}, also from {', '.join(others)}")
        else:
            yield Note(NoteLevel.INFO, "networks[*].vrf", text)
    present = {link.name: link for link in context.facts.links}
    for network, vrf in members:
        link = present.get(network.device)
        if link is not None and link.vrf != vrf.name and network.network.vlan is None:
            yield Note(
                NoteLevel.WARNING,
                network.origin,
                f"{network.device} is put into {vrf.name}: the kernel sets it down and up for that, and what others"
                " routed by it moves to the VRF or is lost",
            )
