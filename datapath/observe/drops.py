# SPDX-License-Identifier: Apache-2.0
"""Dropped packets for people: which network, why, from where to where.

What comes in is dropped by the eBPF program, which hands out samples. What would leave by another way or with another
address (`egress`) is dropped by nftables, which logs it.
"""

from __future__ import annotations

import datetime as dt
import selectors
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from datapath.errors import DatapathError
from datapath.kernel import ingress
from datapath.kernel.bpf.drops import Drop, DropReader
from datapath.kernel.packet_log import LoggedPacket, PacketLog
from datapath.plan.egress import LOG_GROUP, NETWORK_DROPS, owner_and_drop
from datapath.plan.model import Backend, Plan

_NS_PER_S = 1_000_000_000
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}
#: Both readers want to be asked once a second.
_LOOK_S = 0.5


@dataclass(frozen=True, slots=True)
class DropReport:
    """One dropped packet with the names of the policy.

    Attributes:
        at: UTC.
        network: empty for a packet that was dropped before its network was known.
        device: for a packet that was to leave, the one that it was routed to.
        is_leaving: dropped rather than let out by another way or with another address.
        egress: entry that it belongs to; empty where only the network is known, and for what comes in.
        source: None if the header was malformed.
        source_port: 0 without ports.
        translated_to: what a packet that was to leave had for a source by then; None where it was the same.
    """

    at: dt.datetime
    network: str
    device: str
    reason: str
    is_leaving: bool
    egress: str
    source: IPv4Address | IPv6Address | None
    destination: IPv4Address | IPv6Address | None
    protocol: int
    source_port: int
    destination_port: int
    translated_to: IPv4Address | IPv6Address | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "time": self.at.isoformat(timespec="microseconds"),
            "network": self.network or None,
            "device": self.device,
            "direction": "out" if self.is_leaving else "in",
            "egress": self.egress or None,
            "reason": self.reason,
            "source": None if self.source is None else str(self.source),
            "destination": None if self.destination is None else str(self.destination),
            "protocol": self.protocol,
            "source_port": self.source_port,
            "destination_port": self.destination_port,
            "translated_to": None if self.translated_to is None else str(self.translated_to),
        }

    def render(self) -> str:
        """One line."""
        reason = f"egress {self.egress}".strip() + f" {self.reason}" if self.is_leaving else self.reason
        where = f"{self.at:%H:%M:%S.%f} {self.network or '-'} on {self.device or '-'}: {reason}"
        if self.source is None:
            return where
        protocol = _PROTOCOLS.get(self.protocol, f"protocol {self.protocol}")
        ends = [
            (f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}") if port else str(address)
            for address, port in (
                (self.source, self.source_port),
                (self.destination, self.destination_port),
            )
        ]
        carried = f" as {self.translated_to}" if self.translated_to else ""
        return f"{where} {protocol} {ends[0]}{carried} > {ends[1]}"


def watch_drops(plan: Plan, seconds: float | None) -> Iterator[DropReport]:
    """Samples of dropped packets as they happen; the counters have them all.

    At most 100 a second and CPU of those that come in, and 100 a second of those that were to leave.

    Args:
        plan: in force.
        seconds: how long; None for ever.

    Raises:
        DatapathError: there is nothing that could be watched, or somebody else does already.
    """
    with ExitStack() as stack:
        samples = _open_samples(plan, stack)
        log = stack.enter_context(PacketLog(LOG_GROUP)) if plan.egress else None
        selector = stack.enter_context(selectors.DefaultSelector())
        for source in (samples, log):
            if source is not None:
                selector.register(source, selectors.EVENT_READ)
        entering, leaving = _Entering(plan), _Leaving(plan)
        end = None if seconds is None else time.monotonic() + seconds
        while (left := _LOOK_S if end is None else end - time.monotonic()) > 0:
            selector.select(min(left, _LOOK_S))
            if samples is not None:
                yield from map(entering.report, samples.poll(0))
            if log is not None:
                yield from filter(None, map(leaving.report, log.poll()))


def _open_samples(plan: Plan, stack: ExitStack) -> DropReader | None:
    """None where nftables checks what comes in, and `egress` is all that can be watched."""
    if plan.backend is Backend.NFT:
        if plan.egress:
            return None
        raise DatapathError(
            "samples of dropped packets come from the eBPF program, and nftables does its work here",
            hint="`datapath status` counts drops by reason with either backend",
        )
    program_id = ingress.attached_program()
    if program_id is None:
        raise DatapathError("no eBPF program is attached", hint="`datapath apply` attaches it")
    return stack.enter_context(DropReader(program_id))


class _Entering:
    """Names for what the eBPF program dropped."""

    def __init__(self, plan: Plan) -> None:
        self._names = {network.slot: network.name for network in plan.ingress.networks}
        self._boot_ns = time.time_ns() - time.monotonic_ns()

    def report(self, drop: Drop) -> DropReport:
        return DropReport(
            at=dt.datetime.fromtimestamp((self._boot_ns + drop.time_ns) / _NS_PER_S, dt.UTC),
            network=self._names.get(drop.slot, ""),
            device=drop.ifname,
            reason=drop.verdict.label,
            is_leaving=False,
            egress="",
            source=drop.source,
            destination=drop.destination,
            protocol=drop.protocol,
            source_port=drop.source_port,
            destination_port=drop.destination_port,
        )


class _Leaving:
    """Names for what nftables did not let out."""

    def __init__(self, plan: Plan) -> None:
        self._networks = {entry.name: entry.network for entry in plan.egress}

    def report(self, packet: LoggedPacket) -> DropReport | None:
        """None for what somebody else logs to our group."""
        found = owner_and_drop(packet.prefix)
        if found is None:
            return None
        owner, drop = found
        by_network = drop in NETWORK_DROPS
        return DropReport(
            at=dt.datetime.fromtimestamp(packet.time_ns / _NS_PER_S, dt.UTC),
            network=owner if by_network else self._networks.get(owner, ""),
            device=packet.ifname,
            reason=str(drop),
            is_leaving=True,
            egress="" if by_network else owner,
            source=packet.source,
            destination=packet.destination,
            protocol=packet.protocol,
            source_port=packet.source_port,
            destination_port=packet.destination_port,
            translated_to=packet.translated_to,
        )
