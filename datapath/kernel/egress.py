# SPDX-License-Identifier: Apache-2.0
"""Sets that external programs fill, and what was counted of connections that leave by a network."""

from __future__ import annotations

from collections.abc import Mapping

from datapath.kernel.bpf import Counter
from datapath.kernel.nft import parse_table
from datapath.kernel.nft_listing import list_counters, list_nft
from datapath.plan.egress import EGRESS_COUNTER, EgressEntry, members_set
from datapath.plan.nft import TABLE_FAMILY, TABLE_NAME
from datapath.plan.rtnl import Family

#: By entry or network, then by what was counted.
EgressCounters = Mapping[str, Mapping[str, Counter]]


def families_of_set(entry: str) -> frozenset[Family]:
    """The families in which the live table has a set for an entry."""
    items = list_nft(f"sets table {TABLE_FAMILY} {TABLE_NAME}", terse=True)
    names = {item["set"]["name"] for item in items if "set" in item}
    return frozenset(family for family in Family if members_set(entry, family) in names)


def set_elements(entry: str, family: Family) -> dict[str, str]:
    """What the live set holds."""
    name = members_set(entry, family)
    found, _ = parse_table(list_nft(f"set {TABLE_FAMILY} {TABLE_NAME} {name}"))
    return dict(found.maps[name].elements) if name in found.maps else {}


def read_counters(entries: tuple[EgressEntry, ...]) -> EgressCounters:
    """Connections that were opened and packets that were dropped; nothing is asked where the policy has no entry."""
    counters: dict[str, dict[str, Counter]] = {}
    for name, value in list_counters() if entries else ():
        kind, _, rest = name.partition(".")
        if kind == EGRESS_COUNTER:
            owner, _, what = rest.rpartition(".")
            counters.setdefault(owner, {})[what] = value
    return counters
