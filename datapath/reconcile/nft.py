# SPDX-License-Identifier: Apache-2.0
"""From the table that is there to the desired one, in one transaction that touches only what differs."""

from __future__ import annotations

from collections.abc import Iterator

from datapath.plan.nft import NftChain, NftMap, NftTable
from datapath.plan.render import add_rules, declare_chain, declare_map, element_commands, render_table
from datapath.reconcile.actual import ActualChain, ActualMap, ActualTable


def diff_table(actual: ActualTable | None, desired: NftTable | None, *, spec: str) -> str:
    """Text of the transaction; empty where nothing differs.

    Args:
        actual: our table as it is, None where there is none.
        desired: None where none is wanted.
        spec: family and name of our table, for its removal.
    """
    if desired is None:
        return "" if actual is None else f"delete table {spec}\n"
    if actual is None:
        return render_table(desired)
    lines = list(_changes(actual, desired))
    return "\n".join(lines) + "\n" if lines else ""


def _changes(actual: ActualTable, desired: NftTable) -> Iterator[str]:
    """Declare, then empty what changes, then fill, then delete what nothing refers to any more."""
    chains = {chain.name: chain for chain in desired.chains}
    maps = {item.name: item for item in desired.maps}
    stale_chains = sorted(set(actual.chains) - set(chains))
    changed = [chain for chain in desired.chains if _chain_differs(actual.chains.get(chain.name), chain)]
    # A base chain cannot change its hook and a map cannot change its type: those are removed first.
    moved_chains = [c.name for c in changed if _is_moved(actual.chains.get(c.name), c)]
    moved_maps = [m.name for m in desired.maps if _is_retyped(actual.maps.get(m.name), m)]
    stale_maps = sorted(set(actual.maps) - set(maps)) + moved_maps

    for name in [*stale_chains, *moved_chains]:
        yield f"flush chain {desired.spec} {name}"
    for name in moved_chains:
        yield f"delete chain {desired.spec} {name}"
    for name in moved_maps:
        yield f"flush {_noun(actual.maps[name])} {desired.spec} {name}"
    for item in desired.maps:
        if item.name not in actual.maps and item.name not in moved_maps:
            yield declare_map(desired, item)
    for chain in desired.chains:
        if chain.name not in actual.chains or chain.name in moved_chains:
            yield declare_chain(desired, chain)
    for chain in changed:
        if chain.name in actual.chains and chain.name not in moved_chains:
            yield f"flush chain {desired.spec} {chain.name}"
    for name in moved_maps:
        yield f"delete {_noun(actual.maps[name])} {desired.spec} {name}"
        yield declare_map(desired, maps[name])
    for chain in changed:
        yield from add_rules(desired, chain)
    for item in desired.maps:
        before = None if item.name in moved_maps else actual.maps.get(item.name)
        yield from _element_changes(desired, item, before)
    for name in stale_maps:
        if name not in moved_maps:
            yield f"delete {_noun(actual.maps[name])} {desired.spec} {name}"
    for name in stale_chains:
        yield f"delete chain {desired.spec} {name}"


def _chain_differs(actual: ActualChain | None, desired: NftChain) -> bool:
    return actual is None or actual.base != desired.base or actual.digests != desired.digests


def _is_moved(actual: ActualChain | None, desired: NftChain) -> bool:
    return actual is not None and actual.base != desired.base


def _is_retyped(actual: ActualMap | None, desired: NftMap) -> bool:
    return actual is not None and (actual.key_type, actual.value_type, actual.flags) != (
        desired.key_type,
        desired.value_type,
        desired.flags,
    )


def _noun(item: ActualMap) -> str:
    return "map" if item.value_type else "set"


def _element_changes(table: NftTable, item: NftMap, before: ActualMap | None) -> Iterator[str]:
    old = dict(before.elements) if before else {}
    new = dict(item.elements)
    gone = sorted((key, value) for key, value in old.items() if new.get(key) != value)
    come = [(key, value) for key, value in item.elements if old.get(key) != value]
    yield from element_commands("delete", table, item, gone)
    yield from element_commands("add", table, item, come)
