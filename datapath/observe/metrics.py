# SPDX-License-Identifier: Apache-2.0
"""What the daemon tells Prometheus.

The daemon counts in `ServiceStats`, plain Python; only a daemon that was asked for metrics imports
prometheus-client. Packets are read from the kernel when somebody scrapes.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from datapath import __version__
from datapath.errors import DatapathError
from datapath.kernel.bpf import Counter
from datapath.kernel.counters import NetworkCounters, read_counters, read_steered
from datapath.kernel.egress import read_counters as read_egress
from datapath.observe.egress import EgressStatus, egress_status
from datapath.observe.stats import Histogram, ServiceStats
from datapath.plan.egress import NETWORK_DROPS
from datapath.plan.ingress import Verdict


class ServiceCollector(Collector):
    """Turns the daemon's numbers and the kernel's counters into metrics."""

    def __init__(self, stats: ServiceStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        yield from _service_metrics(self._stats)
        yield from _network_metrics(self._stats)


def _service_metrics(stats: ServiceStats) -> Iterator[Metric]:
    info = InfoMetricFamily("datapath_build", "Version of the daemon.")
    info.add_metric([], {"version": __version__})
    yield info
    for name, text, value in (
        ("generation", "Number of the policy in force; 0 where none is.", stats.generation),
        (
            "apply_failed",
            "1 while a policy of the files cannot be put in force on this node.",
            stats.apply_failed,
        ),
        ("policy_rejected", "1 while the policy files hold no valid policy.", stats.policy_rejected),
        ("contested", "1 while somebody undoes our changes again and again.", bool(stats.contested)),
        ("apply_timestamp_seconds", "When a policy was put in force last, Unix time.", stats.applied_at),
        ("filtered_devices", "Devices that have a tc filter and will get tcx instead.", stats.filtered),
        ("drift_unhealed", "Differences that could not be repaired yet.", stats.unhealed),
    ):
        yield GaugeMetricFamily(f"datapath_{name}", text, value=float(value))
    yield CounterMetricFamily(
        "datapath_reconciles", "Comparisons of the kernel with the policy.", value=stats.reconciles
    )
    drift = CounterMetricFamily("datapath_drift_events", "Repairs, by kind of object.", labels=["kind"])
    for kind, count in sorted(stats.drift.items()):
        drift.add_metric([kind], count)
    yield drift
    yield _histogram(
        "datapath_heal_duration_seconds", "From the event that told of a drift to its repair.", stats.heals
    )
    yield _histogram("datapath_apply_duration_seconds", "Putting a policy in force.", stats.applies)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(name, text, buckets=histogram.cumulated(), sum_value=histogram.total)


def _network_metrics(stats: ServiceStats) -> Iterator[Metric]:
    readable = GaugeMetricFamily(
        "datapath_counters_readable", "0 where the kernel's counters cannot be read."
    )
    plan = stats.plan
    counters: NetworkCounters = {}
    steered: dict[str, Counter] = {}
    egress: tuple[EgressStatus, ...] = ()
    try:
        if plan is not None:
            counters, steered = read_counters(plan), read_steered(plan)
            egress = egress_status(plan.egress, read_egress(plan.egress))
        readable.add_metric([], 1)
    except DatapathError:
        readable.add_metric([], 0)
    yield readable
    waiting = GaugeMetricFamily(
        "datapath_network_waiting", "1 while the network's device is missing or down.", labels=["network"]
    )
    for name in stats.networks:
        waiting.add_metric([name], float(name in stats.waiting))
    yield waiting
    yield from _gateways(stats)
    yield from _traffic(counters)
    yield from _steered(steered)
    yield from _egress(egress)


def _egress(found: tuple[EgressStatus, ...]) -> Iterator[Metric]:
    """Nothing without `egress` in the policy."""
    if not found:
        return
    opened = CounterMetricFamily(
        "datapath_egress_opened", "Connections that leave by a network.", labels=["egress", "network"]
    )
    members = GaugeMetricFamily(
        "datapath_egress_members", "Members that an external program named.", labels=["egress"]
    )
    dropped = CounterMetricFamily(
        "datapath_egress_dropped_packets",
        "Packets that were dropped rather than let out by another way or with another address.",
        labels=["egress", "network", "reason"],
    )
    networks: dict[str, EgressStatus] = {}
    for item in found:
        entry = item.entry
        opened.add_metric([entry.name, entry.network], item.opened)
        if entry.members is not None:
            members.add_metric([entry.name], len(entry.members))
        for drop, count in item.dropped.items():
            if drop not in NETWORK_DROPS:
                dropped.add_metric([entry.name, entry.network, str(drop)], count)
        networks.setdefault(entry.network, item)
    for name, item in networks.items():
        for drop in NETWORK_DROPS:
            dropped.add_metric(["", name, str(drop)], item.dropped[drop])
    yield from (opened, members, dropped)


def _gateways(stats: ServiceStats) -> Iterator[Metric]:
    """Nothing where none is watched."""
    # The loop goes on meanwhile.
    watched = dict(stats.gateways)
    if not watched:
        return
    labels = ["network", "gateway"]
    up = GaugeMetricFamily("datapath_gateway_up", "0 while the gateway does not answer.", labels=labels)
    failures = CounterMetricFamily(
        "datapath_gateway_failures", "How often the gateway was found to be down.", labels=labels
    )
    unasked = GaugeMetricFamily(
        "datapath_gateway_unasked",
        "1 while the gateway cannot be asked: then datapath_gateway_up is what it was before.",
        labels=labels,
    )
    for (network, address), is_up in sorted(watched.items(), key=str):
        unasked.add_metric([network, str(address)], float((network, address) in stats.gateways_unasked))
        up.add_metric([network, str(address)], float(is_up))
        failures.add_metric([network, str(address)], stats.gateway_failures[network, address])
    yield from (up, failures, unasked)


def _steered(counters: dict[str, Counter]) -> Iterator[Metric]:
    """Nothing where no network is steered directly."""
    for unit in ("packets", "bytes") if counters else ():
        family = CounterMetricFamily(
            f"datapath_network_steered_{unit}",
            f"{unit.capitalize()} of answers that were sent to their network at egress.",
            labels=["network"],
        )
        for network, counter in sorted(counters.items()):
            family.add_metric([network], counter.packets if unit == "packets" else counter.bytes)
        yield family


def _traffic(counters: NetworkCounters) -> Iterator[Metric]:
    packets, size = (
        CounterMetricFamily(f"datapath_network_{unit}", f"Accepted {unit} that came in.", labels=["network"])
        for unit in ("packets", "bytes")
    )
    dropped, dropped_size = (
        CounterMetricFamily(
            f"datapath_network_dropped_{unit}",
            f"Dropped {unit} that came in, by reason.",
            labels=["network", "reason"],
        )
        for unit in ("packets", "bytes")
    )
    for network, by_verdict in sorted(counters.items()):
        for verdict, counter in sorted(by_verdict.items()):
            if verdict is Verdict.PASS:
                packets.add_metric([network], counter.packets)
                size.add_metric([network], counter.bytes)
            else:
                dropped.add_metric([network, verdict.label], counter.packets)
                dropped_size.add_metric([network, verdict.label], counter.bytes)
    yield from (packets, size, dropped, dropped_size)
