# SPDX-License-Identifier: Apache-2.0
"""What the tc eBPF program must know of each network."""

from __future__ import annotations

from datapath.compiler.context import Context, NetworkContext
from datapath.plan.ingress import IngressNetwork, IngressProgram


def emit_ingress(context: Context) -> IngressProgram:
    """The program's input, sorted by slot; networks without a slot are not looked at."""
    networks = [_network(network) for network in context.networks if network.ids.slot]
    return IngressProgram(context.mask, tuple(sorted(networks, key=lambda network: network.slot)))


def _network(network: NetworkContext) -> IngressNetwork:
    return IngressNetwork(
        name=network.name,
        slot=network.ids.slot,
        fwmark=network.ids.fwmark,
        point=network.point,
        device=network.device,
        vips=tuple(network.network.vip_prefixes),
    )
