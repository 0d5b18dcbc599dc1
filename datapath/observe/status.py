# SPDX-License-Identifier: Apache-2.0
"""Status as a value: what is in force, what it counts, and what drifted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datapath.in_force import parse_in_force
from datapath.kernel.bpf import Counter
from datapath.kernel.counters import NetworkCounters
from datapath.kernel.egress import EgressCounters
from datapath.observe.egress import EGRESS_HEAD, EgressStatus, egress_rows, egress_status
from datapath.plan.ingress import Verdict
from datapath.plan.model import NetworkIds, Plan
from datapath.plan.tc import Hook
from datapath.reconcile.actual import Actual, ActualIngress
from datapath.reconcile.conflicts import users_of_our_tables
from datapath.reconcile.steps import Step
from datapath.reconcile.vrf_conflicts import vrf_conflicts
from datapath.state import State


@dataclass(frozen=True, slots=True)
class NetworkStatus:
    """One network of the policy in force.

    Attributes:
        return_path: as in the policy, or `direct` where answers are sent to the network at egress.
        gateways_down: among several, those that the daemon found to be down.
        counters: None where no packet of the network is looked at.
        steered: those answers; None where there are none.
        vrf: that the device belongs to by the policy; empty for none.
    """

    name: str
    device: str
    vips: tuple[str, ...]
    gateway: tuple[str, ...]
    gateways_down: tuple[str, ...]
    return_path: str
    ids: NetworkIds
    counters: Mapping[Verdict, Counter] | None
    steered: Counter | None = None
    vrf: str = ""

    def show_gateway(self, address: str) -> str:
        return f"{address} (down)" if address in self.gateways_down else address

    def as_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "name": self.name,
            "device": self.device,
            "vips": list(self.vips),
            "gateway": list(self.gateway),
            "gateways_down": list(self.gateways_down),
            "return_path": self.return_path,
            "fwmark": self.ids.fwmark,
            "table": self.ids.table,
            "slot": self.ids.slot,
        }
        if self.ids.zone:
            body["zone"] = self.ids.zone
        if self.vrf:
            body["vrf"] = self.vrf
        if self.counters is not None:
            body["counters"] = {
                verdict.label: {"packets": counter.packets, "bytes": counter.bytes}
                for verdict, counter in self.counters.items()
            }
        if self.steered is not None:
            body["steered"] = {"packets": self.steered.packets, "bytes": self.steered.bytes}
        return body


@dataclass(frozen=True, slots=True)
class Status:
    """The whole node."""

    policy: str
    generation: int
    backend: str
    backend_reason: str
    hook: str
    networks: tuple[NetworkStatus, ...]
    drift: tuple[str, ...]
    notes: tuple[str, ...]
    egress: tuple[EgressStatus, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "policy": self.policy,
            "generation": self.generation,
            "backend": self.backend,
            "backend_reason": self.backend_reason,
            "hook": self.hook,
            "networks": [network.as_json() for network in self.networks],
            **({"egress": [item.as_json() for item in self.egress]} if self.egress else {}),
            "drift": list(self.drift),
            "notes": list(self.notes),
        }

    def render(self) -> str:
        """A table for a terminal."""
        how = f", attached by {self.hook}" if self.hook else ""
        lines = [
            (
                f"policy {self.policy}, generation {self.generation},"
                f" backend {self.backend} ({self.backend_reason}){how}"
            )
        ]
        head = (
            "NETWORK",
            "DEVICE",
            "RETURN PATH",
            "FWMARK",
            "TABLE",
            "GATEWAY",
            "PACKETS",
            "BYTES",
            "DROPPED",
        )
        rows = [head, *(_row(network) for network in self.networks)]
        if any(network.ids.zone for network in self.networks):
            zones = ["ZONE", *(str(network.ids.zone or "-") for network in self.networks)]
            rows = [(*row[:5], zone, *row[5:]) for row, zone in zip(rows, zones, strict=True)]
        lines += _table(rows)
        if self.egress:
            lines += _table([EGRESS_HEAD, *egress_rows(self.egress)])
        lines += self.notes
        if self.drift:
            lines.append(
                f"drift: {len(self.drift)} difference(s) from the policy; `datapath apply` puts right:"
            )
            lines += [f"  - {text}" for text in self.drift]
        else:
            lines.append("no drift: the kernel is as the policy says")
        return "\n".join(lines)


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def make_status(  # noqa: PLR0913  (one argument a source of what is told)
    plan: Plan,
    state: State,
    steps: Sequence[Step],
    waiting: Iterable[str],
    counters: NetworkCounters,
    *,
    actual: Actual | None = None,
    steered: Mapping[str, Counter] | None = None,
    opened: EgressCounters | None = None,
) -> Status:
    """From the comparison with the kernel and what was counted."""
    policy = parse_in_force(state).policy
    ids = {item.name: item for item in plan.ids}
    networks = []
    for network in policy.networks:
        own = ids.get(network.name, NetworkIds(network.name))
        networks.append(
            NetworkStatus(
                network.name,
                network.device,
                tuple(map(str, network.vip_prefixes)),
                tuple(map(str, network.gateway_addresses)),
                tuple(map(str, state.gateways_down.get(network.name, ()))) if network.gateways else (),
                "direct" if steered and network.name in steered else str(network.return_path),
                own,
                counters.get(network.name, {}) if own.slot else None,
                (steered or {}).get(network.name),
                network.vrf.name if network.vrf is not None else "",
            )
        )
    return Status(
        state.policy_name,
        state.generation,
        str(plan.backend),
        plan.backend_reason,
        _how(actual.ingress) if actual is not None else "",
        tuple(networks),
        (
            *_waiting(waiting, actual, plan, state),
            *(step.describe() for step in steps),
        ),
        (
            *(note.render() for note in plan.notes),
            *_ahead(actual),
            *_filtered(actual),
            *_in_our_tables(actual, plan),
            *_probation(state),
        ),
        egress_status(plan.egress, opened or {}),
    )


def _waiting(waiting: Iterable[str], actual: Actual | None, plan: Plan, state: State) -> Iterator[str]:
    """What is waited for. What is wrong with a VRF has other reasons than a device that is down."""
    conflicts = tuple(vrf_conflicts(actual, plan, state.record)) if actual is not None else ()
    yield from conflicts
    in_vrf = {slave.device for slave in plan.slaves} | {vrf.name for vrf in plan.vrfs} if conflicts else set()
    for name in sorted(waiting):
        link = actual.links.get(name) if actual is not None else None
        if name not in in_vrf or (link is None and name not in {vrf.name for vrf in plan.vrfs}):
            yield f"device {name} is missing or down: bring it back"


def _how(ingress: ActualIngress) -> str:
    """How the program is attached; empty where it is not."""
    hooks = {ingress.hook} if ingress.attached - ingress.filtered else set()
    if ingress.filtered:
        hooks.add(Hook.CLSACT)
    return " and ".join(sorted(hooks, reverse=True))


def filtered_note(actual: Actual) -> str:
    """How many devices have a filter although there is tcx; empty where none has."""
    count = len(actual.ingress.filtered)
    return (
        f"{count} device(s) have a tc filter, which a running daemon replaces by tcx bit by bit"
        if count
        else ""
    )


def _filtered(actual: Actual | None) -> Iterator[str]:
    if actual is not None and (text := filtered_note(actual)):
        yield f"info: {text}"


def _ahead(actual: Actual | None) -> Iterator[str]:
    if actual is None:
        return
    for device, name in (*actual.ingress.ahead, *actual.steering.ahead):
        yield (
            f"warning: {device}: the tcx program {name} sees packets before ours; those that it drops, redirects or"
            " accepts for good do not reach ours"
        )


def _in_our_tables(actual: Actual | None, plan: Plan) -> Iterator[str]:
    """What no apply puts right, since it is not ours."""
    if actual is not None:
        yield from (f"warning: {text}" for text in users_of_our_tables(actual, plan))


def _probation(state: State) -> Iterator[str]:
    if state.pending is not None:
        back = f"generation {state.pending.previous}" if state.pending.previous else "no policy"
        yield f"warning: goes back to {back} by itself unless `datapath confirm` comes"


def _dropped(counters: Mapping[Verdict, Counter] | None) -> str:
    """By reason, the reasons that happened."""
    if counters is None:
        return "-"
    reasons = [
        f"{verdict.label} {counter.packets}"
        for verdict, counter in counters.items()
        if verdict is not Verdict.PASS and counter.packets
    ]
    return ", ".join(reasons) or "0"


def _row(network: NetworkStatus) -> tuple[str, ...]:
    ids = network.ids
    total = None if network.counters is None else network.counters.get(Verdict.PASS, Counter())
    return (
        network.name,
        f"{network.device} ({network.vrf})" if network.vrf else network.device,
        network.return_path,
        f"{ids.fwmark:#010x}" if ids.fwmark else "-",
        str(ids.table or "-"),
        ", ".join(map(network.show_gateway, network.gateway)) or "-",
        "-" if total is None else str(total.packets),
        "-" if total is None else str(total.bytes),
        _dropped(network.counters),
    )
