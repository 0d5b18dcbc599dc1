# SPDX-License-Identifier: Apache-2.0
"""How many nf_tables expressions a policy with `egress` costs each kind of packet, over all of its hooks.

Beside the chains that every policy has (`test_nft_length`): before routing, source NAT of first packets, last look.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.plan.render import render_table
from datapath.policy import parse_policy
from tests.gate.bytecode import Chains, Packet, Walk, parse, parse_verdicts
from tests.netns.nodes import node

pytestmark = pytest.mark.root

POLICY: Final = """version: 1
backend: ebpf
node: {internal: [10.112.0.0/12]}
networks:
- {name: a, interface: eth1, vips: [10.1.0.0/24], gateway: 10.1.0.1}
egress:
- {name: web, network: a, sources: [172.16.1.0/24], source_ip: 10.1.0.20}
"""
#: Marks of the network and of its egress connections, as they are allocated.
NETWORK, EGRESS = 0x00010000, 0x00020000
CONFIRMED, DNAT = 0x8, 0x20
#: Names of devices as nft compares them, by their first four bytes.
OURS, OTHER = (int.from_bytes(name, "little") for name in (b"eth1", b"eth2"))
_ADDRESS: Final = int.from_bytes(bytes((10, 1, 0, 20)), "little")
#: An IPv4 packet to somebody outside: no set holds anything of it.
_LOADS: Final = {
    "ct load status": 0,
    "ct load state": 0x8,
    "ct load src_ip": 0,
    "ct load dst_ip": 0,
    "meta load nfproto": 2,
    "meta load iifname": OTHER,
    "meta load oifname": OTHER,
    "fib daddr type": 1,
    "payload load 4b @ network header + 12": 0,
    "payload load 4b @ network header + 16": 0,
}
_KNOWN: Final = _LOADS | {"ct load status": CONFIRMED, "ct load state": 0x2}
_BY_OURS: Final = {"meta load oifname": OURS, "payload load 4b @ network header + 12": _ADDRESS}
_SOURCE: Final = ("sources4.web",)
FIRST, LATER = ("egress-forward", "egress-snat", "egress-guard"), ("egress-forward", "egress-guard")

#: Class of packet -> the chains that it enters one after the other, the packet, expressions, and how it ends.
BUDGET: Final = {
    "not ours, known": (LATER, Packet(loads=_KNOWN), 11, "accept"),
    "not ours, known, answer": (LATER, Packet(direction=1, loads=_KNOWN), 11, "accept"),
    "not ours, known, with a mark of others": (LATER, Packet(ct_mark=0x4000, loads=_KNOWN), 21, "accept"),
    "not ours, first": (FIRST, Packet(loads=_LOADS), 43, ""),
    "not ours, first, to a pod": (FIRST, Packet(loads=_LOADS, sets=("egress-inside",)), 35, ""),
    "not ours, first, to the node": (("egress-forward",), Packet(loads=_LOADS, sets=("__set",)), 12, ""),
    "to a service, first": (
        FIRST,
        Packet(loads=_LOADS | {"ct load status": DNAT}, sets=("egress-services", *_SOURCE)),
        45,
        "",
    ),
    "reply of a VIP": (LATER, Packet(ct_mark=NETWORK, direction=1, loads=_KNOWN), 15, "accept"),
    "request to a VIP, known": (LATER, Packet(ct_mark=NETWORK, loads=_KNOWN), 21, "accept"),
    "egress, first": (FIRST, Packet(loads=_LOADS | _BY_OURS, sets=_SOURCE), 55, "accept"),
    "egress, known": (LATER, Packet(ct_mark=EGRESS, loads=_KNOWN | _BY_OURS), 25, "accept"),
    "egress, answer": (LATER, Packet(ct_mark=EGRESS, direction=1, loads=_KNOWN), 15, "accept"),
    "egress, known, by another device": (LATER, Packet(ct_mark=EGRESS, loads=_KNOWN), 24, "drop"),
    "egress, first, not recognised": (("egress-guard",), Packet(loads=_LOADS, sets=_SOURCE), 23, "drop"),
}


@pytest.fixture(scope="module")
def listing() -> str:
    """The bytecode of the table, as the kernel lists it."""
    table = compile_policy(parse_policy(POLICY.encode(), "policy.yaml").policy, Facts()).table
    assert table is not None
    with node(4) as where:
        where.namespace.nft(render_table(table))
        return where.run("nft", "--debug=netlink", "list", "table", "inet", "datapath")


@pytest.mark.parametrize("kind", BUDGET)
def test_expressions_of_each_kind_of_packet(listing: str, kind: str) -> None:
    starts, packet, budget, verdict = BUDGET[kind]
    chains: Chains = parse(listing)
    verdicts = parse_verdicts(listing)
    count = 0
    for start in starts:
        walk = Walk(chains, start, packet, verdicts)
        count += walk.expressions
        # What source NAT writes is in the packet of an egress connection from the start: it is only counted here.
        packet = replace(walk.packet)
    assert (count, walk.verdict) == (budget, verdict)
