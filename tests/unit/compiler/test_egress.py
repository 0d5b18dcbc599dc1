# SPDX-License-Identifier: Apache-2.0
"""What `egress` compiles to, where the rulesets and the kernel tests do not already say it."""

from __future__ import annotations

import re
from ipaddress import ip_interface, ip_network
from typing import Any

import pytest

from datapath.compiler import compile_policy, with_members
from datapath.errors import CompileError
from datapath.facts import Facts, LinkFacts
from datapath.plan.egress import member_elements
from datapath.plan.model import Plan
from datapath.plan.nft import NftTable
from datapath.plan.rtnl import Family
from tests.unit.compiler.walk import facts_after, policy

WEB = {"name": "web", "network": "n0", "sources": ["10.112.1.2"], "source_ip": "network"}
INSIDE = {"internal": ["10.96.0.0/11", "fd00:10::/32"]}


def compiled(
    networks: list[dict[str, Any]], *entries: dict[str, Any], facts: Facts | None = None, **top: Any
) -> Plan:
    return compile_policy(policy(networks, node=INSIDE, egress=list(entries), **top), facts or Facts())


def table(plan: Plan) -> NftTable:
    assert plan.table is not None
    return plan.table


def rules(plan: Plan, chain: str) -> list[str]:
    return [rule.text for found in table(plan).chains if found.name == chain for rule in found.rules]


def marks(plan: Plan) -> dict[str, int]:
    return {ids.name: ids.fwmark for ids in plan.ids}


def test_without_entries_nothing_of_it_is_there() -> None:
    assert compiled([{}]) == compile_policy(policy([{}], node=INSIDE), Facts())
    assert not [chain.name for chain in table(compiled([{}])).chains if "egress" in chain.name]


def test_networks_keep_their_numbers_when_egress_comes() -> None:
    plain = marks(compiled([{}, {}, {}]))
    with_egress = compiled(
        [{}, {}, {}], WEB, WEB | {"name": "far", "network": "n1", "sources": ["10.112.2.0/24"]}
    )
    assert {name: mark for name, mark in marks(with_egress).items() if "." not in name} == plain
    assert sorted(set(marks(with_egress)) - set(plain)) == ["n0.egress", "n1.egress"]
    assert len(set(marks(with_egress).values())) == 5
    # Its mark stands in no rule: what carries it is routed as without the policy.
    assert marks(with_egress)["n0.egress"] not in {rule.fwmark for rule in with_egress.rules}


def test_marks_of_connections_stay_when_networks_come() -> None:
    before = compiled([{}], WEB)
    after = compiled([{}, {}, {}], WEB, facts=facts_after(before))
    assert marks(after)["n0.egress"] == marks(before)["n0.egress"]
    assert len(set(marks(after).values())) == 4


def test_a_mask_without_room_is_refused_at_the_entry() -> None:
    with pytest.raises(CompileError) as caught:
        compiled([{}, {}, {}], WEB, marks={"mask": 0x300})
    (problem,) = caught.value.problems
    assert problem.path == ("egress", 0)
    assert "holds 3" in problem.message


def test_marks_that_move_to_another_mask_are_carried_over() -> None:
    before = compiled([{}], WEB)
    facts = facts_after(before)
    facts = facts.model_copy(update={"previous_ids": facts.ids, "previous_mask": facts.fwmark_mask})
    after = compiled([{}], WEB, facts=facts, marks={"mask": 0x7F000000})
    assert [change.name for change in after.mark_changes] == ["n0", "n0.egress"]


@pytest.mark.parametrize(
    ("addresses", "chosen"),
    [
        (["192.0.2.77/32", "10.0.0.9/24"], "10.0.0.9"),
        (["192.0.2.77/32", "192.0.2.78/32"], "192.0.2.77"),
        (["127.0.0.1/8", "fe80::1/64"], None),
        ([], None),
    ],
)
def test_own_address_of_the_device(addresses: list[str], chosen: str | None) -> None:
    link = LinkFacts(name="eth0", addresses=tuple(ip_interface(text) for text in addresses))
    plan = compiled([{}], WEB, facts=Facts(links=(link,)))
    (found,) = plan.egress
    assert [str(address) for address in found.addresses] == ([chosen] if chosen else [])
    (verdict,) = [text for text in rules(plan, "egress-new") if "sources4.web" in text]
    assert verdict.endswith(
        "goto egress-open.n0"
        if chosen
        else 'counter name "egress.web.no_address" log prefix "egress.web.no_address" group 25712 drop'
    )
    assert bool([note for note in plan.notes if "are dropped until it has one" in note.text]) == (not chosen)


def test_replies_to_its_addresses_are_checked_like_what_comes_to_a_vip() -> None:
    plan = compiled([{}], WEB | {"source_ip": ["10.0.0.9", "100.64.0.1-100.64.0.2"]})
    (network,) = plan.ingress.networks
    assert {ip_network("100.64.0.1/32"), ip_network("100.64.0.2/32")} <= set(network.vips)
    denied = {str(rule.prefix): rule.origin for rule in plan.ingress.common_sources}
    # A VIP may move to another node, whose packets come by the network then.
    assert "10.0.0.9/32" not in denied
    assert denied["100.64.0.1/32"] == "egress[*].source_ip"


def test_who_is_dropped_by_the_guard_is_who_is_recognised_before_routing() -> None:
    """The same matches in the same order, or something is let out or held back that is not meant."""
    entries = (
        WEB | {"destinations": ["203.0.113.0/24"]},
        WEB | {"name": "jobs", "set": True, "exclude": ["198.18.0.0/15"], "sources": ["10.112.9.0/24"]},
    )
    link = LinkFacts(name="eth0", addresses=(ip_interface("10.0.0.9/24"),))
    plan = compiled([{}], *entries, facts=Facts(links=(link,)))

    def matches(chain: str) -> list[str]:
        return [text.rpartition(" goto ")[0] or text.partition(" counter ")[0] for text in rules(plan, chain)]

    before = [text.removesuffix(" return") for text in matches("egress-new")]
    assert before == [text.removesuffix(" return") for text in matches("egress-late")]
    untracked = [text.removesuffix(" return") for text in matches("egress-untracked")]
    assert untracked[0] == "ip6 hoplimit 255 icmpv6 type { 133-137 }"
    assert [re.sub(r"^ct original (ip6?) saddr", r"\1 saddr", text) for text in before] == untracked[1:]


def test_the_nodes_own_address_among_the_sources_is_said() -> None:
    link = LinkFacts(name="eth9", addresses=(ip_interface("10.112.1.2/24"),))
    (note,) = [n for n in compiled([{}], WEB, facts=Facts(links=(link,))).notes if "own address" in n.text]
    assert "10.112.1.2" in note.text
    narrow = WEB | {"destinations": ["203.0.113.0/24"]}
    assert not [
        n for n in compiled([{}], narrow, facts=Facts(links=(link,))).notes if "own address" in n.text
    ]


def test_members_are_elements_and_nothing_else() -> None:
    jobs = {"name": "jobs", "network": "n0", "set": True, "source_ip": "10.0.0.9"}
    members = tuple(
        ip_network(text) for text in ("10.112.1.3/32", "10.112.1.2/32", "10.112.2.0/24", "fd00:10::1/128")
    )
    empty, filled = compiled([{}], jobs), compiled([{}], jobs, facts=Facts(egress_sets={"jobs": members}))
    assert table(empty).chains == table(filled).chains
    different = [
        (a.name, a.elements, b.elements)
        for a, b in zip(table(empty).maps, table(filled).maps, strict=True)
        if a != b
    ]
    assert different == [
        ("members4.jobs", (), (("10.112.1.2", ""), ("10.112.1.3", ""), ("10.112.2.0/24", "")))
    ]
    # The daemon's short cut is no other way to the same.
    assert with_members(empty, {"jobs": members}) == filled
    assert with_members(filled, {}) == empty
    assert member_elements(members, Family.IPV6) == (("fd00:10::1", ""),)
