# SPDX-License-Identifier: Apache-2.0
"""Connections that leave by a network, as status and metrics tell of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datapath.kernel.bpf import Counter
from datapath.kernel.egress import EgressCounters
from datapath.plan.egress import NETWORK_DROPS, OPENED, EgressDrop, EgressEntry


@dataclass(frozen=True, slots=True)
class EgressStatus:
    """One entry of the policy in force.

    Attributes:
        opened: connections.
        dropped: packets, by reason; those of the network are told with each of its entries.
    """

    entry: EgressEntry
    opened: int
    dropped: Mapping[EgressDrop, int]

    def as_json(self) -> dict[str, Any]:
        entry = self.entry
        return {
            "name": entry.name,
            "network": entry.network,
            "device": entry.device,
            "sources": [str(prefix) for prefix in entry.sources],
            "set": None if entry.members is None else len(entry.members),
            "addresses": [str(address) for address in entry.addresses],
            "opened": self.opened,
            "dropped": {str(drop): count for drop, count in self.dropped.items()},
        }


def egress_status(entries: Iterable[EgressEntry], counters: EgressCounters) -> tuple[EgressStatus, ...]:
    """From the plan and what was counted."""
    return tuple(
        EgressStatus(
            entry,
            counters.get(entry.name, {}).get(OPENED, Counter()).packets,
            {
                drop: counters.get(entry.network if drop in NETWORK_DROPS else entry.name, {})
                .get(drop, Counter())
                .packets
                for drop in EgressDrop
            },
        )
        for entry in entries
    )


EGRESS_HEAD = ("EGRESS", "NETWORK", "SOURCES", "SOURCE IP", "OPENED", "DROPPED")
_SHOWN = 2


def egress_rows(found: Iterable[EgressStatus]) -> Iterator[tuple[str, ...]]:
    """For the table of `datapath status`."""
    for item in found:
        entry = item.entry
        sources = [_few(map(str, entry.sources))] if entry.sources else []
        if entry.members is not None:
            sources.append(f"set of {len(entry.members)}")
        reasons = [f"{drop} {count}" for drop, count in item.dropped.items() if count]
        yield (
            entry.name,
            entry.network,
            ", ".join(sources),
            _few(map(str, entry.addresses)) or "none",
            str(item.opened),
            ", ".join(reasons) or "0",
        )


def _few(words: Iterable[str]) -> str:
    listed = list(words)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
