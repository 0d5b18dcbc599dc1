# SPDX-License-Identifier: Apache-2.0
"""The end of connections that leave by a network: none of them may go on by another way when their rules go.

While the new table is in place, the marks that it no longer knows are kept in a set, and what carries one of them
is dropped as it leaves. Then these connections are forgotten, and only then the set goes.
"""

from __future__ import annotations

from datapath.plan.egress import NETWORKS_MAP, RETIRED_SET
from datapath.plan.model import Plan
from datapath.plan.nft import (
    TABLE_FAMILY,
    TABLE_NAME,
    BaseChain,
    ChainType,
    Hook,
    NftChain,
    NftMap,
    NftRule,
    NftTable,
)
from datapath.plan.render import declare_map, element_commands
from datapath.reconcile.actual import Actual, ActualTable

#: As the guard of the table: after all source NAT, before a new connection is confirmed.
_PRIORITY = 300


def retired_marks(actual: Actual, desired: Plan) -> tuple[int, ...]:
    """Marks of connections that the table knows and is not to know; also of a change that was killed meanwhile."""
    if actual.table is None or not actual.fwmark_mask:
        return ()
    maps = actual.table.maps
    known = set(maps[NETWORKS_MAP].elements.items()) if NETWORKS_MAP in maps else set()
    wanted = (
        {e for item in desired.table.maps if item.name == NETWORKS_MAP for e in item.elements}
        if desired.table
        else set()
    )
    left = {int(key, 16) for key, _ in known - wanted} - {change.old for change in desired.mark_changes}
    closing = {int(key, 16) for key in maps[RETIRED_SET].elements} if RETIRED_SET in maps else set()
    closing -= {int(key, 16) for key, _ in wanted}
    return tuple(sorted(left | closing))


def published(actual: ActualTable | None, table: NftTable | None) -> str:
    """A transaction that makes the new interval sets of the table, before its rules ask for them; empty for none.

    With the rules in one transaction, single packets do not find what a new set holds (seen on 6.18): a source
    that stays one would not be recognised.
    """
    if actual is None or table is None or not any(item.name == NETWORKS_MAP for item in table.maps):
        return ""
    new = [item for item in table.maps if item.name not in actual.maps and "interval" in item.flags]
    lines = [declare_map(table, item) for item in new]
    for item in new:
        lines += element_commands("add", table, item, item.elements)
    return "\n".join(lines) + "\n" if lines else ""


def with_retired(table: NftTable | None, marks: tuple[int, ...], mask: int) -> NftTable:
    """The table as it is until those connections are forgotten."""
    table = table or NftTable(TABLE_FAMILY, TABLE_NAME)
    elements = tuple((f"{mark:#010x}", "") for mark in marks)
    rule = NftRule(
        f"ct mark != 0 ct direction original ct mark & {mask:#010x} @{RETIRED_SET} drop",
        "egress[*] connections of what is gone are being closed",
    )
    chain = NftChain(RETIRED_SET, (rule,), BaseChain(ChainType.FILTER, Hook.POSTROUTING, _PRIORITY))
    return table.also([chain], [NftMap(RETIRED_SET, "mark", "", elements)])
