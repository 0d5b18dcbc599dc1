# SPDX-License-Identifier: Apache-2.0
"""What was counted, by network and verdict, whichever backend counts."""

from __future__ import annotations

from datapath.kernel import ingress, steering
from datapath.kernel.bpf import Counter
from datapath.kernel.nft_listing import list_counters
from datapath.plan.ingress import Verdict
from datapath.plan.model import Backend, Plan

NetworkCounters = dict[str, dict[Verdict, Counter]]
_VERDICTS = {verdict.label: verdict for verdict in Verdict}


def read_counters(plan: Plan) -> NetworkCounters:
    """Packets and bytes of every network that is looked at; a network that saw nothing has no entry.

    Raises:
        KernelError: the eBPF program's maps cannot be read.
    """
    if plan.backend is Backend.NFT:
        return _nft_counters()
    by_slot = ingress.read_counters() if plan.backend is Backend.EBPF else {}
    return {
        network.name: by_slot[network.slot] for network in plan.ingress.networks if network.slot in by_slot
    }


def read_steered(plan: Plan) -> dict[str, Counter]:
    """Answers that the egress program sent to their network, for every network that is steered directly.

    Raises:
        KernelError: the program's maps cannot be read.
    """
    if not plan.steering.networks:
        return {}
    by_slot = steering.read_counters()
    return {network.name: by_slot.get(network.slot, Counter()) for network in plan.steering.networks}


def _nft_counters() -> NetworkCounters:
    found: NetworkCounters = {}
    for name, value in list_counters():
        network, _, label = name.rpartition(".")
        if label in _VERDICTS:
            found.setdefault(network, {})[_VERDICTS[label]] = value
    return found
