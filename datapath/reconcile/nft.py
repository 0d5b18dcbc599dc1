# SPDX-License-Identifier: Apache-2.0
"""From the table that is there to the desired one, in one transaction that touches only what differs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from datapath.plan.nft import NftChain, NftFlowtable, NftMap, NftTable
from datapath.plan.render import (
    add_rules,
    declare_chain,
    declare_counter,
    declare_map,
    element_commands,
    flowtable_commands,
    render_table,
)
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


@dataclass(frozen=True, slots=True)
class _Difference:
    """Which chains and maps differ, by name, in the order of the desired table.

    Attributes:
        changed: chains whose rules are written again; the moved ones are among them.
        moved: base chains with another hook, which the kernel cannot change: deleted and made again.
        retyped: maps with another type, likewise.
    """

    changed: tuple[NftChain, ...]
    moved: frozenset[str]
    stale_chains: tuple[str, ...]
    retyped: frozenset[str]
    stale_maps: tuple[str, ...]


def _compare(actual: ActualTable, desired: NftTable) -> _Difference:
    changed = tuple(c for c in desired.chains if _chain_differs(actual.chains.get(c.name), c))
    return _Difference(
        changed,
        frozenset(chain.name for chain in changed if _is_moved(actual.chains.get(chain.name), chain)),
        tuple(sorted(set(actual.chains) - {chain.name for chain in desired.chains})),
        frozenset(item.name for item in desired.maps if _is_retyped(actual.maps.get(item.name), item)),
        tuple(sorted(set(actual.maps) - {item.name for item in desired.maps})),
    )


def as_actual(table: NftTable) -> ActualTable:
    """A table as it will be once it has been applied."""
    return ActualTable(
        {chain.name: ActualChain(chain.digests, chain.base) for chain in table.chains},
        {m.name: ActualMap(m.key_type, m.value_type, dict(m.elements), m.flags) for m in table.maps},
        frozenset(table.counters),
        {item.name: frozenset(item.devices) for item in table.flowtables},
    )


def _changes(actual: ActualTable, desired: NftTable) -> Iterator[str]:
    """Empty what goes, declare what comes, fill what changes, delete what nothing refers to any more."""
    difference = _compare(actual, desired)
    yield from _empty(actual, desired, difference)
    yield from _declare(actual, desired, difference)
    for chain in difference.changed:
        yield from add_rules(desired, chain)
    for item in desired.maps:
        before = None if item.name in difference.retyped else actual.maps.get(item.name)
        yield from _element_changes(desired, item, before)
    for name in difference.stale_maps:
        yield f"delete {_noun(actual.maps[name])} {desired.spec} {name}"
    for name in difference.stale_chains:
        yield f"delete chain {desired.spec} {name}"
    for name in sorted(actual.counters - set(desired.counters)):
        yield f"delete counter {desired.spec} {name}"


def _empty(actual: ActualTable, desired: NftTable, difference: _Difference) -> Iterator[str]:
    changed = [chain.name for chain in difference.changed if chain.name in actual.chains]
    for name in [*difference.stale_chains, *changed]:
        yield f"flush chain {desired.spec} {name}"
    # No rule speaks of it any more. Before another one comes: a table takes each device only once.
    for name in sorted(set(actual.flowtables) - {item.name for item in desired.flowtables}):
        yield f"delete flowtable {desired.spec} {name}"
    for name in sorted(difference.moved):
        yield f"delete chain {desired.spec} {name}"
    for name in sorted(difference.retyped):
        yield f"delete {_noun(actual.maps[name])} {desired.spec} {name}"


def _declare(actual: ActualTable, desired: NftTable, difference: _Difference) -> Iterator[str]:
    for name in desired.counters:
        if name not in actual.counters:
            yield declare_counter(desired, name)
    for item in desired.maps:
        if item.name not in actual.maps or item.name in difference.retyped:
            yield declare_map(desired, item)
    for flowtable in desired.flowtables:
        yield from _flowtable_changes(actual, desired, flowtable)
    for chain in desired.chains:
        if chain.name not in actual.chains or chain.name in difference.moved:
            yield declare_chain(desired, chain)


def _flowtable_changes(actual: ActualTable, desired: NftTable, item: NftFlowtable) -> Iterator[str]:
    """Device by device: what is carried by the others goes on."""
    before = actual.flowtables.get(item.name)
    gone = tuple(sorted((before or frozenset()) - set(item.devices)))
    come = tuple(name for name in item.devices if name not in (before or ()))
    if gone:
        yield from flowtable_commands("delete", desired, item, gone)
    if come or before is None:
        yield from flowtable_commands("add", desired, item, come)


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
