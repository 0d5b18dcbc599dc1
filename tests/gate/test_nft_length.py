# SPDX-License-Identifier: Apache-2.0
"""How many nf_tables expressions each kind of packet costs: a change that makes the chains longer must say so here.

Counted, not timed: the same on every machine. One expression is 3 to 10 ns (docs/performance.md).
"""

from __future__ import annotations

from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.plan.render import render_table
from tests.gate.bytecode import Chains, Packet, Walk, parse
from tests.netns.nodes import node
from tests.unit.compiler.walk import policy

pytestmark = pytest.mark.root

MASK: Final = 0x0FFF0000
OURS: Final = 0x00030000
FOREIGN: Final = 0x0000C000
REPLY: Final = 1

#: Class of packet -> chain that it enters, the packet, and the expressions that it costs.
BUDGET: Final = {
    "request of a new connection": ("prerouting", Packet(mark=OURS), 19),
    "request of a known connection": ("prerouting", Packet(mark=OURS, ct_mark=OURS), 12),
    "reply": ("prerouting", Packet(ct_mark=OURS, direction=REPLY), 13),
    "reply of a local socket": ("output", Packet(ct_mark=OURS, direction=REPLY), 10),
    "not ours, original direction": ("prerouting", Packet(), 5),
    "not ours, reply": ("prerouting", Packet(direction=REPLY), 5),
    "not ours, sent by the node": ("output", Packet(), 2),
    "new, beside a connection mark of others": ("prerouting", Packet(OURS, FOREIGN), 37),
    "reply, beside a packet mark of others": ("prerouting", Packet(FOREIGN, OURS, REPLY), 39),
}


def compiled(networks: int) -> Chains:
    """The bytecode of a policy's table, as the kernel lists it."""
    table = compile_policy(policy([{}] * networks), Facts()).table
    assert table is not None
    with node(4) as where:
        where.namespace.nft(render_table(table))
        return parse(where.run("nft", "--debug=netlink", "list", "table", "inet", "datapath"))


@pytest.fixture(scope="module")
def chains() -> Chains:
    return compiled(3)


@pytest.mark.parametrize("kind", BUDGET)
def test_expressions_of_each_kind_of_packet(chains: Chains, kind: str) -> None:
    start, packet, budget = BUDGET[kind]
    # Fewer fails, too: a budget that is too large would let the next change through.
    assert Walk(chains, start, packet).expressions == budget


def test_the_table_is_as_long_with_a_thousand_networks(chains: Chains) -> None:
    assert compiled(1000) == chains


@given(mark=st.integers(0, 0xFFFFFFFF), ct_mark=st.integers(0, 0xFFFFFFFF), direction=st.sampled_from([0, 1]))
def test_the_walk_does_what_the_chains_are_for(
    chains: Chains, mark: int, ct_mark: int, direction: int
) -> None:
    """The bytecode over all marks: a wrong walk would count nonsense."""
    after = Walk(chains, "prerouting", Packet(mark, ct_mark, direction)).packet
    saved = mark & MASK if direction == 0 and not ct_mark & MASK else ct_mark & MASK
    restored = ct_mark & MASK if direction == REPLY else 0
    assert after.ct_mark == ct_mark & ~MASK | saved
    assert after.mark == mark & ~MASK | restored
