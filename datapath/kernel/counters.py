# SPDX-License-Identifier: Apache-2.0
"""What was counted, by network and verdict, whichever backend counts."""

from __future__ import annotations

import json

import nftables

from datapath.kernel import ingress, steering
from datapath.kernel.bpf import Counter
from datapath.plan.ingress import Verdict
from datapath.plan.model import Backend, Plan
from datapath.plan.nft import TABLE_FAMILY, TABLE_NAME

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
    nft = nftables.Nftables()
    nft.set_json_output(True)
    status, output, _ = nft.cmd(f"list counters table {TABLE_FAMILY} {TABLE_NAME}")
    found: NetworkCounters = {}
    if status != 0 or not output:
        return found
    for item in json.loads(output)["nftables"]:
        counter = item.get("counter")
        if counter is None:
            continue
        network, _, label = counter["name"].rpartition(".")
        if label in _VERDICTS:
            value = Counter(counter["packets"], counter["bytes"])
            found.setdefault(network, {})[_VERDICTS[label]] = value
    return found
