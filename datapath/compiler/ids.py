# SPDX-License-Identifier: Apache-2.0
"""Marks, tables and slots: allocated once, read back from the kernel, never moved.

What a network already has in the kernel stays, unless the policy pins something else. New networks
take the lowest free number in the order of their names, so that a fresh node's ids do not depend on
the order of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from datapath.compiler.context import ROUTED, STEERED, Treatment
from datapath.compiler.pool import Pool
from datapath.compiler.zone_ids import allocate_zones
from datapath.errors import CompileError, PolicyPath, Problem
from datapath.facts import Facts, IdFacts
from datapath.plan.egress import egress_name
from datapath.plan.model import NetworkIds
from datapath.plan.rtnl import RESERVED_TABLES, Family
from datapath.policy import Policy
from datapath.policy.marks import capacity, deposit, extract
from datapath.policy.model import NETWORKS_MAX

#: First table id of ours is one above; clear of Calico (1..250), OVN-Kubernetes (1000 + ifindex), VRFs
#: that follow connection-tracking zones (up to 65535) and FRR's pbrd, which counts up from 10000.
TABLE_BASE = 700_000
SLOT_MAX = 0xFFFF
#: The kernel keeps its tables in so many lists, by the low bits of their ids (FIB_TABLE_HASHSZ, FIB6_TABLE_HASHSZ),
#: the newest first. Ours stay out of those of default (253), main and local: every routing look-up walks them.
_LISTS = 256
_LISTS_OF_OURS = 253
_BASE_LIST = TABLE_BASE % _LISTS


def table_of(index: int) -> int:
    """The table with that number, from 1 up, among those that lie in no list of the system's own tables."""
    block, position = divmod(index + _BASE_LIST, _LISTS_OF_OURS)
    return TABLE_BASE - _BASE_LIST + block * _LISTS + position


def _index_of(table: int) -> int:
    """The reverse; negative for a table that somebody chose elsewhere."""
    block, position = divmod(table - (TABLE_BASE - _BASE_LIST), _LISTS)
    if table <= TABLE_BASE or position >= _LISTS_OF_OURS:
        return -table
    return block * _LISTS_OF_OURS + position - _BASE_LIST


@dataclass(frozen=True)
class _Need:
    """Who wants which ids: a network, or the connections that leave by it.

    Attributes:
        pinned_mark, pinned_table: 0 where the policy leaves the choice.
        is_egress: those connections; networks come first, so that egress moves none of their numbers.
    """

    name: str
    path: PolicyPath
    mark: bool
    table: bool
    slot: bool
    known: IdFacts
    pinned_mark: int = 0
    pinned_table: int = 0
    is_egress: bool = False


def allocate(
    policy: Policy, facts: Facts, treatments: Sequence[Mapping[Family, Treatment]]
) -> dict[str, NetworkIds]:
    """Ids of every network, by name, and of the connections that leave by one, by `egress_name`.

    Args:
        policy: with what it pins.
        facts: with what the kernel has.
        treatments: one for each network, in the policy's order.

    Raises:
        CompileError: the mask has too few values, or a pinned id is taken by another network.
    """
    mask = policy.marks.effective_mask
    needs = [*_needs(policy, facts, treatments), *_egress_needs(policy, facts)]
    by_name = sorted(needs, key=lambda need: (need.is_egress, need.name))
    names = {need.name for need in needs}
    gone = [ids for ids in facts.ids if ids.name not in names]
    # A VRF that somebody made since has its table to itself.
    never = RESERVED_TABLES | {link.vrf_table for link in facts.links}
    vrf_tables = {network.name: network.vrf.table for network in policy.networks if network.vrf is not None}
    slots = _allocate(
        by_name,
        lambda need: need.slot,
        lambda _: 0,
        lambda need: need.known.slot,
        {},
        freed=frozenset(ids.slot for ids in gone),
    )
    marks = _allocate(
        by_name,
        lambda need: need.mark,
        lambda need: extract(need.pinned_mark, mask),
        lambda need: _known_index(need.known, facts, mask),
        {name: slot for name, slot in slots.items() if slot <= _room(mask)},
        freed=frozenset(_known_index(ids, facts, mask) for ids in gone),
        limit=_room(mask),
    )
    tables = _allocate(
        by_name,
        lambda need: need.table,
        lambda need: _index_of(need.pinned_table) if need.pinned_table else 0,
        lambda need: 0 if need.known.table in never else _index_of(need.known.table),
        slots,
        freed=frozenset(_index_of(ids.table) for ids in gone),
        taken=frozenset(_index_of(table) for table in vrf_tables.values()),
    )
    zones = allocate_zones(policy, facts)
    _refuse_overflow(needs, marks, mask)
    return {
        need.name: NetworkIds(
            need.name,
            deposit(marks.get(need.name, 0), mask),
            vrf_tables.get(need.name) or _table(tables.get(need.name, 0)),
            slots.get(need.name, 0),
            zones.get(need.name, 0),
            need.name in vrf_tables,
        )
        for need in needs
    }


def _needs(policy: Policy, facts: Facts, treatments: Sequence[Mapping[Family, Treatment]]) -> Iterator[_Need]:
    known = {ids.name: ids for ids in facts.ids}
    for position, (network, by_family) in enumerate(zip(policy.networks, treatments, strict=True)):
        treated = by_family.values()
        steered = not STEERED.isdisjoint(treated)
        yield _Need(
            network.name,
            ("networks", position),
            mark=Treatment.CONNTRACK in treated,
            table=network.vrf is None and not ROUTED.isdisjoint(treated),
            slot=steered or "reverse_path" in network.model_fields_set,
            known=known.get(network.name) or IdFacts(name=network.name),
            pinned_mark=network.mark or 0,
            pinned_table=network.table or 0,
        )


def _egress_needs(policy: Policy, facts: Facts) -> Iterator[_Need]:
    """One mark for each network that connections are opened by: it stands in the connection only, never in a rule."""
    known = {ids.name: ids for ids in facts.ids}
    first: dict[str, int] = {}
    for position, entry in enumerate(policy.egress):
        first.setdefault(entry.network, position)
    for network, position in first.items():
        name = egress_name(network)
        yield _Need(
            name,
            ("egress", position),
            mark=True,
            table=False,
            slot=False,
            known=known.get(name) or IdFacts(name=name),
            is_egress=True,
        )


def _allocate(  # noqa: PLR0913  (one call a kind of id; a class would only rename the arguments)
    needs: Iterable[_Need],
    wanted: Callable[[_Need], bool],
    pinned: Callable[[_Need], int],
    known: Callable[[_Need], int],
    wishes: dict[str, int],
    *,
    freed: frozenset[int] = frozenset(),
    taken: frozenset[int] = frozenset(),
    limit: int = SLOT_MAX,
) -> dict[str, int]:
    """Pins first, then what the kernel has, then new ones in the order of the needs."""
    pool = Pool(set(taken))
    result: dict[str, int] = {}
    rest = [need for need in needs if wanted(need)]
    for source in (pinned, known):
        waiting = []
        for need in rest:
            number = source(need)
            if number and pool.claim(number):
                result[need.name] = number
            else:
                waiting.append(need)
        rest = waiting
    for need in rest:
        wish = wishes.get(need.name, 0)
        result[need.name] = pool.take(wish, freed, limit)
    return result


def _table(index: int) -> int:
    return table_of(index) if index > 0 else -index


def _room(mask: int) -> int:
    """The largest index of a mark: wider masks have more values than our block of ip rules has places."""
    return min(capacity(mask), NETWORKS_MAX)


def _known_index(known: IdFacts, facts: Facts, mask: int) -> int:
    index = extract(known.fwmark, mask) if known.fwmark and facts.fwmark_mask == mask else 0
    return index if index <= _room(mask) else 0


def _refuse_overflow(needs: Iterable[_Need], marks: dict[str, int], mask: int) -> None:
    problems = tuple(_overflow(need, mask) for need in needs if marks.get(need.name, 0) > _room(mask))
    if problems:
        raise CompileError(problems)


def _overflow(need: _Need, mask: int) -> Problem:
    room = _room(mask)
    if not need.pinned_mark:
        whose = "connections that leave by it" if need.is_egress else f"network {need.name}"
        return Problem(
            need.path,
            f"no mark is left for {whose}: mask {mask:#010x} holds {room}",
            "widen marks.mask",
        )
    index = extract(need.pinned_mark, mask)
    return Problem(
        (*need.path, "mark"),
        f"mark {need.pinned_mark:#x} is value {index} of the mask {mask:#010x}, and ip rules have room for {room}",
        f"use a value up to {deposit(room, mask):#x}, or leave `mark` out: one is chosen",
    )
