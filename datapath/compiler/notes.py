# SPDX-License-Identifier: Apache-2.0
"""What a reviewer should hear: why nothing is done, and where the policy may not be enough."""

from __future__ import annotations

from collections.abc import Iterator

from datapath.compiler.context import Context, NetworkContext, Treatment, on_own_subnet
from datapath.plan.model import Note, NoteLevel


def emit_notes(context: Context) -> tuple[Note, ...]:
    """Notes in the order of the policy."""
    notes = [note for network in context.networks for note in _network_notes(network)]
    notes += [
        Note(
            NoteLevel.WARNING,
            "host",
            f"IPv{family} forwarding is off: pods cannot be reached through this node; it is not ours to switch on",
        )
        for family in (4, 6)
        if not context.facts.forwarding.get(family, True)
        and any(family in network.treatments for network in context.networks)
    ]
    return tuple(notes)


def _network_notes(network: NetworkContext) -> Iterator[Note]:
    for family in network.families(Treatment.NOTHING):
        subnets = {str(on_own_subnet(vip, network.link)) for vip in network.vip_prefixes(family)}
        yield Note(
            NoteLevel.INFO,
            network.origin,
            f"nothing to do for IPv{family}: the VIPs are in the own subnet of {network.device}"
            f" ({', '.join(sorted(subnets))}), which the node routes already",
        )
    for family in network.families(Treatment.ON_LINK):
        yield Note(
            NoteLevel.INFO,
            network.origin,
            f"no IPv{family} gateway: an on-link route on {network.device} is all that is needed",
        )
    if network.network.has_external_routes:
        yield Note(
            NoteLevel.INFO,
            network.origin,
            f"others fill table {network.ids.table}: until a route of theirs leads to a client, replies to it are"
            " refused and never leave by another network",
        )
    if Treatment.SOURCE in network.treatments.values():
        yield Note(
            NoteLevel.WARNING,
            network.origin,
            "return_path: source serves only replies that carry the VIP when they are routed (local sockets, IPVS);"
            " behind DNAT (kube-proxy in iptables or nftables mode) use return_path: conntrack",
        )
    if network.link is None and network.network.vlan is None:
        yield Note(NoteLevel.WARNING, network.origin, f"this host has no device {network.device}")
