# SPDX-License-Identifier: Apache-2.0
"""From any table to any other in one transaction that the kernel takes, touching only what differs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.kernel.nft import list_table
from datapath.plan.nft import BaseChain, ChainType, Hook, NftChain, NftMap, NftRule, NftTable
from datapath.plan.render import render_table
from datapath.reconcile.actual import ActualChain, ActualMap, ActualTable
from datapath.reconcile.nft import diff_table
from tests.netns.nodes import inside, node
from tests.unit.compiler.walk import facts_after, policy

SPEC = "inet datapath"
PREROUTING = BaseChain(ChainType.FILTER, Hook.PREROUTING, -140)


def as_actual(table: NftTable | None) -> ActualTable | None:
    """The table as it is read back after it was applied."""
    if table is None:
        return None
    return ActualTable(
        {chain.name: ActualChain(chain.digests, chain.base) for chain in table.chains},
        {
            item.name: ActualMap(item.key_type, item.value_type, dict(item.elements), item.flags)
            for item in table.maps
        },
    )


def tables() -> dict[str, NftTable | None]:
    """Tables of one node as its policy changes, ids kept, and some that only an older version could have made."""
    one = compile_policy(policy([{}]), Facts())
    two = compile_policy(policy([{}, {"track": "last"}]), facts_after(one))
    swapped = compile_policy(policy([{"mark": 0x20000}, {"mark": 0x10000}]), facts_after(two))
    masked = compile_policy(policy([{}, {}], marks={"mask": 0x0F00}), facts_after(two))
    source = compile_policy(policy([{"return_path": "source"}]), Facts())
    goto = NftRule("meta mark vmap @save", "older")
    other_hook = BaseChain(ChainType.FILTER, Hook.INPUT, 0)
    older = NftTable(
        "inet",
        "datapath",
        (
            NftChain("extra", (NftRule("accept", "older"),)),
            NftChain("output", (goto,), other_hook),
            NftChain("prerouting", (), PREROUTING),
        ),
        (
            NftMap("extra", "ipv4_addr", "", (("192.0.2.1", ""),)),
            NftMap("save", "mark", "verdict", (("0x00000001", "jump extra"),)),
        ),
    )
    retyped = NftTable(
        "inet",
        "datapath",
        (NftChain("prerouting", (NftRule("ip saddr @restore accept", "older"),), PREROUTING),),
        (NftMap("restore", "ipv4_addr", "", (("192.0.2.1", ""),)),),
    )
    return {
        "none": None,
        "one": one.table,
        "two": two.table,
        "swapped": swapped.table,
        "masked": masked.table,
        "source": source.table,
        "older": older,
        "retyped": retyped,
    }


@pytest.mark.root
def test_every_transition_is_taken_by_the_kernel_and_reads_back() -> None:
    made = tables()
    with node(4) as where:
        for before, after in itertools.permutations(made, 2):
            old, new = made[before], made[after]
            if old is not None:
                where.namespace.nft(render_table(old))
            text = diff_table(as_actual(old), new, spec=SPEC)
            where.namespace.nft(text)
            with inside(where.namespace.name):
                found = list_table("inet", "datapath")
            actual = None if found is None else found[0]
            assert diff_table(actual, new, spec=SPEC) == "", f"{before} -> {after}"
            assert (actual is None) == (new is None)
            if actual is not None and new is not None:
                assert set(actual.chains) == {chain.name for chain in new.chains}
                assert set(actual.maps) == {item.name for item in new.maps}
                where.namespace.nft(f"delete table {SPEC}\n")


@pytest.mark.parametrize("name", [name for name, table in tables().items() if table is not None])
def test_nothing_differs_from_itself(name: str) -> None:
    table = tables()[name]
    assert diff_table(as_actual(table), table, spec=SPEC) == ""


def test_a_new_network_is_one_more_element_whatever_there_is_already() -> None:
    before = compile_policy(policy([{}] * 20), Facts())
    after = compile_policy(policy([{}] * 21), facts_after(before))
    lines = diff_table(as_actual(before.table), after.table, spec=SPEC).splitlines()
    comment = "network=n20 fwmark=0x00150000 table=700021 slot=21"
    assert lines == [f'add element {SPEC} ids {{ 0x00000015 comment "{comment}" }}']


def test_a_network_that_follows_takes_its_elements_first_and_its_chain_last() -> None:
    before = compile_policy(policy([{"track": "last"}] * 2), Facts())
    after = compile_policy(policy([{"track": "last"}]), facts_after(before))
    lines = diff_table(as_actual(before.table), after.table, spec=SPEC).splitlines()
    assert [line.split(" {")[0] for line in lines] == [
        f"flush chain {SPEC} follow-n1",
        f"delete element {SPEC} follow",
        f"delete element {SPEC} ids",
        f"delete chain {SPEC} follow-n1",
    ]


DAMAGE: dict[str, Callable[[ActualTable], ActualTable]] = {
    "a foreign rule in our chain": lambda t: ActualTable(
        {**t.chains, "follow-n0": ActualChain((*t.chains["follow-n0"].digests, None))}, t.maps
    ),
    "a rule of ours is gone": lambda t: ActualTable({**t.chains, "follow-n0": ActualChain(())}, t.maps),
    "our rules in another order": lambda t: ActualTable(
        {**t.chains, "ingress": ActualChain(t.chains["ingress"].digests[::-1])}, t.maps
    ),
    "a foreign chain": lambda t: ActualTable({**t.chains, "foreign": ActualChain((None,))}, t.maps),
    "a chain is gone": lambda t: ActualTable(
        {name: chain for name, chain in t.chains.items() if name != "output"}, t.maps
    ),
    "an element is gone": lambda t: ActualTable(
        t.chains, {**t.maps, "follow": ActualMap("mark", "verdict", {})}
    ),
    "an id has changed": lambda t: ActualTable(
        t.chains, {**t.maps, "ids": ActualMap("mark", "", {"0x00000001": "network=n0"})}
    ),
    "an element leads elsewhere": lambda t: ActualTable(
        t.chains, {**t.maps, "follow": ActualMap("mark", "verdict", {"0x00010000": "accept"})}
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_seen_and_healed_where_it_is(what: str) -> None:
    table = compile_policy(policy([{"track": "last"}]), Facts()).table
    sound = as_actual(table)
    assert sound is not None
    damaged = DAMAGE[what](sound)
    text = diff_table(damaged, table, spec=SPEC)
    assert text
    names = {name for name in damaged.chains.keys() | sound.chains.keys() if f"chain {SPEC} {name}\n" in text}
    differing = {
        name
        for name in damaged.chains.keys() | sound.chains.keys()
        if damaged.chains.get(name) != sound.chains.get(name)
    }
    assert names <= differing
    assert ("element" in text) == ("element" in what or "id" in what.split())
