# SPDX-License-Identifier: Apache-2.0
"""The nftables table as it is to be, and as it is on the way there: while marks change, while connections move."""

from __future__ import annotations

from dataclasses import dataclass

from datapath.compiler.acceleration import NO_ACCELERATION, emit_acceleration
from datapath.compiler.context import Context
from datapath.compiler.marks import Classification, emit_table
from datapath.compiler.nft_ingress import emit_classification
from datapath.compiler.translation import mark_changes, with_translation
from datapath.compiler.zones import with_zones, zone_changes, zone_notes, zones_before, zones_now
from datapath.plan.ingress import IngressProgram
from datapath.plan.model import Backend, MarkChange, Note, ZoneChange
from datapath.plan.nft import NftTable


@dataclass(frozen=True, slots=True)
class Tables:
    """As in `Plan`, with the notes about the changes."""

    table: NftTable | None
    mark_changes: tuple[MarkChange, ...] = ()
    zone_changes: tuple[ZoneChange, ...] = ()
    transition: NftTable | None = None
    holding: NftTable | None = None
    notes: tuple[Note, ...] = ()


def emit_tables(
    context: Context, program: IngressProgram, backend: Backend, rule_bank: int, egress: Classification
) -> Tables:
    """The final table, and those of the change; `egress` is in all of them."""
    by_nft = emit_classification(context, program) if backend is Backend.NFT else Classification()
    acceleration = emit_acceleration(context, by_nft.chains)
    by_nft = by_nft.also(egress)
    plain = emit_table(context, by_nft, rule_bank=rule_bank, acceleration=acceleration)
    marks, warnings = mark_changes(context)
    if plain is None:
        return Tables(None, marks, notes=warnings)
    zones = zone_changes(context)
    table = with_zones(plain, zones_now(context))
    notes = (*warnings, *zone_notes(context, zones))
    if not marks and not zones:
        return Tables(table, notes=notes)
    before = zones_before(context, zones)
    if zones:
        # A connection that is carried past the hooks cannot be moved: all of them come back first.
        acceleration = NO_ACCELERATION

    def _emit(classification: Classification) -> NftTable | None:
        return emit_table(
            context, classification, rule_bank=rule_bank, acceleration=acceleration, moving=zones
        )

    meanwhile = _emit(by_nft) or plain
    if marks and backend is Backend.EBPF and context.facts.marked_by_nft:
        # The old program of marks is a part of the old table: without it, and without the new program, nobody marks.
        nft = emit_classification(context, program).also(egress)
        transition = _emit(nft) or plain
    else:
        transition = meanwhile
    if marks:
        transition = with_translation(transition, marks)
    return Tables(
        table,
        marks,
        zones,
        with_zones(transition, before),
        with_zones(meanwhile, before, [change.device for change in zones]) if zones else None,
        notes,
    )
