# SPDX-License-Identifier: Apache-2.0
"""What each kind of network compiles to, family by family; and equal bytes for equal input."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from ipaddress import ip_interface
from typing import Any

import pytest

from datapath.compiler import compile_policy
from datapath.facts import Facts, LinkFacts
from datapath.plan.model import NoteLevel, Plan
from datapath.plan.render import plan_digest
from datapath.plan.rtnl import Family
from datapath.policy import Policy
from tests.sources import REPOSITORY
from tests.unit.compiler.walk import policy

ETH1 = LinkFacts(name="eth1", addresses=(ip_interface("192.0.2.10/24"), ip_interface("2001:db8:1::10/64")))
HOST = Facts(links=(ETH1,))


def one(**network: Any) -> Policy:
    return Policy.model_validate({"version": 1, "networks": [{"name": "net", "interface": "eth1"} | network]})


def compiled(**network: Any) -> Plan:
    return compile_policy(one(**network), HOST)


def routes(plan: Plan) -> list[str]:
    return [route.render() for route in plan.routes]


def texts(plan: Plan) -> list[str]:
    return [note.text for note in plan.notes]


@pytest.mark.parametrize(
    "vips", [["192.0.2.100-192.0.2.120"], ["2001:db8:1::100"], ["192.0.2.7", "2001:db8:1::7"]]
)
def test_vips_in_the_own_subnet_need_nothing(vips: list[str]) -> None:
    plan = compiled(vips=vips)
    assert plan.is_empty
    assert not plan.ids
    assert all("own subnet of eth1" in text for text in texts(plan))
    assert plan.notes


def test_vips_in_a_foreign_subnet_get_a_route_on_the_link() -> None:
    plan = compiled(vips=["10.9.8.0/24", "2001:db8:9::/64"])
    assert routes(plan) == [
        "-4 10.9.8.0/24 dev eth1 table 254 protocol 78",
        "-6 2001:db8:9::/64 dev eth1 table 254 protocol 78 metric 1024",
    ]
    assert (plan.ids, plan.rules, plan.table, plan.ingress.networks) == ((), (), None, ())


def test_only_vips_outside_the_own_subnet_get_a_route() -> None:
    assert routes(compiled(vips=["192.0.2.100", "10.9.8.7"])) == [
        "-4 10.9.8.7/32 dev eth1 table 254 protocol 78"
    ]


def test_a_gateway_in_one_family_only() -> None:
    """The other family is served on the link, and has no rules: its packets carry a mark that nothing asks for."""
    plan = compiled(vips=["198.51.100.0/24", "2001:db8:9::/64"], gateway="198.51.100.1")
    assert {rule.family for rule in plan.rules} == {Family.IPV4}
    assert [route for route in routes(plan) if route.startswith("-6")] == [
        "-6 2001:db8:9::/64 dev eth1 table 254 protocol 78 metric 1024"
    ]


def test_a_table_has_its_link_its_gateway_and_an_end() -> None:
    plan = compiled(
        vips=["198.51.100.7", "2001:db8:9::7"],
        gateway=["10.0.0.1", "fe80::1"],
        on_link=["10.0.0.0/30", "10.0.1.0/24", "2001:db8:9::/64"],
    )
    assert routes(plan) == [
        "-4 0.0.0.0/0 via 10.0.0.1 dev eth1 onlink table 700001 protocol 78",
        "-4 unreachable 0.0.0.0/0 table 700001 protocol 78 metric 4294967295",
        "-4 10.0.0.0/30 dev eth1 table 700001 protocol 78",
        "-4 10.0.1.0/24 dev eth1 table 700001 protocol 78",
        "-6 ::/0 via fe80::1 dev eth1 onlink table 700001 protocol 78 metric 1024",
        "-6 unreachable ::/0 table 700001 protocol 78 metric 4294967295",
        "-6 2001:db8:9::/64 dev eth1 table 700001 protocol 78 metric 1024",
        "-6 fe80::/64 dev eth1 table 700001 protocol 78 metric 1024",
    ]


def test_return_path_none_marks_nothing() -> None:
    plan = compiled(vips=["198.51.100.0/24"], gateway="198.51.100.1", return_path="none")
    assert plan.is_empty


def test_return_path_source_needs_no_mark_and_says_where_it_fails() -> None:
    plan = compiled(vips=["198.51.100.0/24"], gateway="198.51.100.1", return_path="source")
    assert plan.ids[0].fwmark == 0
    assert plan.ids[0].table
    assert not any(rule.fwmask for rule in plan.rules)
    (note,) = [note for note in plan.notes if note.level is NoteLevel.WARNING]
    assert "DNAT" in note.text
    assert plan.table is not None
    assert [chain.name for chain in plan.table.chains if chain.base] == []


def test_rp_filter_is_off_only_where_ipv4_replies_are_steered() -> None:
    assert compiled(vips=["198.51.100.0/24"], gateway="198.51.100.1").rp_filter_exempt == ("eth1",)
    assert compiled(vips=["2001:db8:9::/64"], gateway="2001:db8:9::1").rp_filter_exempt == ()
    assert compiled(vips=["10.9.8.0/24"]).rp_filter_exempt == ()


def test_strict_arp_sets_this_device_only() -> None:
    plan = compiled(vips=["10.9.8.0/24"], strict_arp=True)
    assert [item.render() for item in plan.sysctls] == [
        "net/ipv4/conf/eth1/arp_announce=2",
        "net/ipv4/conf/eth1/arp_ignore=1",
    ]


@pytest.mark.parametrize("family", [4, 6])
def test_forwarding_that_is_off_is_said_and_not_changed(family: int) -> None:
    facts = HOST.model_copy(update={"forwarding": {4: True, 6: True} | {family: False}})
    plan = compile_policy(one(vips=["10.9.8.0/24", "2001:db8:9::/64"]), facts)
    assert [text for text in texts(plan) if "forwarding is off" in text] == [
        f"IPv{family} forwarding is off: pods cannot be reached through this node; it is not ours to switch on"
    ]
    assert not any("forward" in item.key for item in plan.sysctls)


def test_a_device_that_is_not_there_is_said() -> None:
    plan = compile_policy(one(vips=["10.9.8.0/24"]), Facts())
    assert "this host has no device eth1" in texts(plan)


_DIGEST_OF_A_BIG_PLAN = """
from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.plan.render import plan_digest
from tests.unit.compiler.walk import policy
networks = [{"track": "last" if n % 3 else "first", "strict_arp": n % 2 == 0} for n in range(60)]
print(plan_digest(compile_policy(policy(networks, node={"internal": ["172.16.0.0/12", "fd00::/8"]}), Facts())))
"""


def test_equal_bytes_in_every_process() -> None:
    """Python's hashes differ from process to process; the order of a plan must not."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", _DIGEST_OF_A_BIG_PLAN],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "42")
    }
    assert len(digests) == 1


def test_the_order_of_the_file_changes_no_object() -> None:
    networks = [{"name": f"n{n}", "interface": f"eth{n}"} for n in range(5)]
    subject = policy(networks)
    backwards = subject.model_copy(update={"networks": subject.networks[::-1]})
    one_way, other_way = compile_policy(subject, Facts()), compile_policy(backwards, Facts())
    assert one_way.notes != other_way.notes
    assert _without_notes(one_way) == _without_notes(other_way)


def _without_notes(plan: Plan) -> str:
    return plan_digest(dataclasses.replace(plan, notes=()))
