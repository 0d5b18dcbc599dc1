# SPDX-License-Identifier: Apache-2.0
"""A network gets another mark: its connections keep working, from packet to packet.

For the length of one change the table also knows the old marks. A packet that carries one is given the new
one, and so is a connection, by whichever of its packets comes first. What sends no packet meanwhile is
rewritten through ctnetlink, and then the old marks are forgotten.
"""

from __future__ import annotations

import dataclasses

from datapath.compiler.context import Context
from datapath.plan.egress import egress_name
from datapath.plan.model import MarkChange, Note, NoteLevel
from datapath.plan.nft import FULL, NftChain, NftMap, NftRule, NftTable


def mark_changes(context: Context) -> tuple[tuple[MarkChange, ...], tuple[Note, ...]]:
    """Networks whose mark changes, and a warning for each whose connections cannot be told apart meanwhile."""
    facts = context.facts
    old_mask = facts.previous_mask
    old = {ids.name: ids.fwmark for ids in facts.previous_ids if ids.fwmark}
    marked = {network.name: network.ids.fwmark for network in context.networks if network.is_marked}
    marked |= {egress_name(name): fwmark for name, fwmark in context.egress_marks.items()}
    changes = [
        MarkChange(name, old[name], old_mask, mark, context.mask)
        for name, mark in sorted(marked.items())
        if name in old and old_mask and old[name] != mark
    ]
    seen_under_old_mask = {mark & old_mask: name for name, mark in marked.items()}
    clear = tuple(c for c in changes if seen_under_old_mask.get(c.old, c.name) == c.name)
    notes = tuple(
        Note(
            NoteLevel.WARNING,
            f"networks[{change.name}].mark",
            f"the old mark {change.old:#010x} means {seen_under_old_mask[change.old]} from now on:"
            f" connections of {change.name} that are open now are forgotten",
        )
        for change in changes
        if change not in clear
    )
    return clear, notes


def with_translation(table: NftTable, changes: tuple[MarkChange, ...]) -> NftTable:
    """The table as it is during the change: it understands the old marks, too."""
    old_mask = changes[0].old_mask
    connection = NftRule(f"ct mark & {old_mask:#010x} vmap @moved", "marks are changing: connections")
    packet = NftRule(f"meta mark & {old_mask:#010x} vmap @remarked", "marks are changing: packets")
    before = {"prerouting": (packet, connection), "output": (connection,)}
    present = tuple(
        dataclasses.replace(chain, rules=(*before.get(chain.name, ()), *chain.rules))
        for chain in table.chains
    )
    chains: list[NftChain] = []
    for change in changes:
        write = f"& {FULL & ~(change.old_mask | change.new_mask):#010x} | {change.new:#010x}"
        origin = f"networks[{change.name}] marks are changing"
        chains.append(NftChain(f"moved-{change.name}", (NftRule(f"ct mark set ct mark {write}", origin),)))
        chains.append(
            NftChain(f"remarked-{change.name}", (NftRule(f"meta mark set meta mark {write}", origin),))
        )
    maps = [
        NftMap(
            verb,
            "mark",
            "verdict",
            tuple(sorted((f"{change.old:#010x}", f"jump {verb}-{change.name}") for change in changes)),
        )
        for verb in ("moved", "remarked")
    ]
    return dataclasses.replace(table, chains=present).also(chains, maps)
