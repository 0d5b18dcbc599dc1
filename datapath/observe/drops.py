# SPDX-License-Identifier: Apache-2.0
"""Dropped packets for people: which network, why, from where to where."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datapath.errors import DatapathError
from datapath.kernel import ingress
from datapath.kernel.bpf.drops import Drop, iter_drops
from datapath.plan.model import Backend, Plan

_NS_PER_S = 1_000_000_000
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}


@dataclass(frozen=True, slots=True)
class DropReport:
    """One dropped packet with the names of the policy.

    Attributes:
        at: UTC.
        network: empty for a packet that was dropped before its network was known.
    """

    at: dt.datetime
    network: str
    drop: Drop

    def as_json(self) -> dict[str, Any]:
        drop = self.drop
        return {
            "time": self.at.isoformat(timespec="microseconds"),
            "network": self.network or None,
            "device": drop.ifname,
            "reason": drop.verdict.label,
            "source": None if drop.source is None else str(drop.source),
            "destination": None if drop.destination is None else str(drop.destination),
            "protocol": drop.protocol,
            "source_port": drop.source_port,
            "destination_port": drop.destination_port,
        }

    def render(self) -> str:
        """One line."""
        drop = self.drop
        where = f"{self.at:%H:%M:%S.%f} {self.network or '-'} on {drop.ifname}: {drop.verdict.label}"
        if drop.source is None:
            return where
        protocol = _PROTOCOLS.get(drop.protocol, f"protocol {drop.protocol}")
        ends = [
            (f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}") if port else str(address)
            for address, port in (
                (drop.source, drop.source_port),
                (drop.destination, drop.destination_port),
            )
        ]
        return f"{where} {protocol} {ends[0]} > {ends[1]}"


def watch_drops(plan: Plan, seconds: float | None) -> Iterator[DropReport]:
    """Samples of dropped packets as they happen; at most 100 per second and CPU, the counters have them all.

    Args:
        plan: in force.
        seconds: how long; None for ever.

    Raises:
        DatapathError: nothing is attached, nftables does the work, or somebody else watches already.
    """
    if plan.backend is Backend.NFT:
        raise DatapathError(
            "samples of dropped packets come from the eBPF program, and nftables does its work here",
            hint="`datapath status` counts drops by reason with either backend",
        )
    program_id = ingress.attached_program()
    if program_id is None:
        raise DatapathError("no eBPF program is attached", hint="`datapath apply` attaches it")
    names: Mapping[int, str] = {network.slot: network.name for network in plan.ingress.networks}
    boot = time.time_ns() - time.monotonic_ns()
    for drop in iter_drops(program_id, seconds=seconds):
        at = dt.datetime.fromtimestamp((boot + drop.time_ns) / _NS_PER_S, dt.UTC)
        yield DropReport(at, names.get(drop.slot, ""), drop)
