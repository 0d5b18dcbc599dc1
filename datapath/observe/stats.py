# SPDX-License-Identifier: Apache-2.0
"""What the daemon counts of itself, for metrics and status; written by its loop, read by whoever scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address

from datapath.plan.model import Plan

GatewayKey = tuple[str, IPv4Address | IPv6Address]
#: Seconds; the promise is 0.1.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


@dataclass(slots=True)
class Histogram:
    """Durations in seconds, by bucket."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS_S) + 1))
    total: float = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_S, seconds)] += 1
        self.total += seconds

    def cumulated(self) -> list[tuple[str, float]]:
        """Upper bounds and counts up to them, as Prometheus has it."""
        result, sum_ = [], 0
        for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), self.counts, strict=True):
            sum_ += count
            result.append((bound, float(sum_)))
        return result


@dataclass(slots=True)
class ServiceStats:
    """The daemon's numbers.

    Attributes:
        plan: in force, None where nothing is.
        networks: names of the policy in force.
        waiting: networks whose device is missing or down.
        contested: what somebody undoes again and again.
        unhealed: differences that are left for the next attempt.
        filtered: devices that have a tc filter and will get tcx instead.
        drift: repairs by kind of object.
        heals: from event to repair.
        gateways: those that are watched, by network and address, and whether they are up.
        gateway_failures: how often they went down.
        gateways_unasked: those of which nobody knows, because they cannot be asked.
        applied_at: Unix time of the last apply, 0 before the first.
    """

    generation: int = 0
    plan: Plan | None = None
    networks: tuple[str, ...] = ()
    waiting: frozenset[str] = frozenset()
    contested: frozenset[str] = frozenset()
    unhealed: int = 0
    reconciles: int = 0
    filtered: int = 0
    drift: Counter[str] = field(default_factory=Counter)
    heals: Histogram = field(default_factory=Histogram)
    applies: Histogram = field(default_factory=Histogram)
    gateways: dict[GatewayKey, bool] = field(default_factory=dict)
    gateway_failures: Counter[GatewayKey] = field(default_factory=Counter)
    gateways_unasked: frozenset[GatewayKey] = frozenset()
    apply_failed: bool = False
    policy_rejected: bool = False
    applied_at: float = 0.0
