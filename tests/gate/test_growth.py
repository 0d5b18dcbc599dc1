# SPDX-License-Identifier: Apache-2.0
"""The work of a policy grows with its networks, not with their square: at 4,094 networks that is seconds or an hour.

Counted are lines of Python as they are executed, comprehensions a line for each element: no clock, no noise.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_interface
from types import FrameType
from typing import Any, Final

import pytest

from datapath.compiler import Compiler, compile_policy
from datapath.controller import id_facts
from datapath.facts import Facts, LinkFacts
from datapath.policy import parse_policy
from datapath.reconcile.actual import Actual, ActualLink, Record
from datapath.reconcile.diff import reconcile

FEW, MANY = 25, 100
#: What is made once, or remembered from one policy to the next, is made with these; counted is the work with others.
USED_TO, COUNTED = 1, 101
#: Sorting and the decision tree of the ip rules are a logarithm more than linear.
GROWTH_MAX: Final = 1.25 * MANY / FEW

NETWORK: Final = (
    "- {{name: n{n}, interface: eth0.{n}, vips: [10.{n}.0.0/24, '2001:db8:{n:x}::/64'], {more}"
    " gateway: [10.{n}.0.1, '2001:db8:{n:x}::1']}}"
)
TRUNK: Final = NETWORK.replace("interface: eth0.{n}", "vlan: {{parent: eth1, id: {n}}}")
VRF: Final = "vrf: {{name: vrf{n}, table: {n}, create: true}},"
GATEWAYS: Final = NETWORK.replace(
    "gateway: [", "gateway_check: {{interval_ms: 1000}}, gateways: [10.{n}.0.2, '2001:db8:{n:x}::2', "
)
EGRESS: Final = (
    "- {{name: e{n}, network: n{n}, sources: [172.16.{n}.0/24, 'fd00:{n:x}::/64'],"
    " source_ip: [10.{n}.0.20, '2001:db8:{n:x}::20']}}"
)
#: Of the lines that a compile from nothing takes. What a chain for each network is made of is not taken over yet.
SHARE_MAX: Final = {"nft": 0.7, "source": 0.7, "egress": 0.85}
KINDS: Final = {
    "ebpf": ("backend: ebpf", NETWORK, "", ""),
    "nft": ("backend: nft", NETWORK, "", ""),
    "trunk": ("backend: ebpf", TRUNK, "", ""),
    "direct": ("{backend: ebpf, steering: direct}", NETWORK, "", ""),
    "isolated": ("backend: ebpf", NETWORK, "isolate_clients: true,", ""),
    "source": ("backend: nft", NETWORK, "return_path: source,", ""),
    "vrf": ("backend: ebpf", NETWORK, VRF, ""),
    "gateways": ("backend: ebpf", GATEWAYS, "", ""),
    "egress": ("backend: ebpf", NETWORK, "", EGRESS),
}


def text_of(kind: str, first: int, networks: int) -> str:
    head, network, more, egress = KINDS[kind]
    numbers = range(first, first + networks)
    lines = ["version: 1", *head.strip("{}").split(", "), "node: {internal: [172.16.0.0/12, 'fd00::/16']}"]
    lines += ["networks:", *(network.format(n=n, more=more.format(n=n)) for n in numbers)]
    return (
        "\n".join([*lines, *(["egress:", *(egress.format(n=n) for n in numbers)] if egress else [])]) + "\n"
    )


def facts_of(first: int, networks: int) -> Facts:
    links = [
        LinkFacts(
            name=f"eth0.{n}",
            mtu=1500,
            addresses=(ip_interface(f"10.{n}.0.9/24"), ip_interface(f"2001:db8:{n:x}::9/64")),
        )
        for n in range(first, first + networks)
    ]
    ways = [LinkFacts(name=name, mtu=1500) for name in ("eth0", "eth1")]
    return Facts(links=(*ways, *links), default_devices={4: ("eth0",), 6: ("eth0",)})


@contextmanager
def counted() -> Iterator[Callable[[], int]]:
    count = 0

    def trace(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: count
    finally:
        sys.settrace(before)


def lines_of(work: Callable[[], Any]) -> int:
    with counted() as count:
        work()
    return count()


def assert_linear(prepare: Callable[[int, int], Callable[[], Any]]) -> None:
    """Prepare the work for networks from a number on, do it, and compare what it takes."""
    lines = {}
    for networks in (FEW, MANY):
        prepare(USED_TO, networks)()
        lines[networks] = lines_of(prepare(COUNTED, networks))
    assert lines[MANY] <= GROWTH_MAX * lines[FEW], f"lines by number of networks: {lines}"


@pytest.mark.parametrize("kind", KINDS)
def test_reading_and_checking(kind: str) -> None:
    def prepare(first: int, networks: int) -> Callable[[], Any]:
        text = text_of(kind, first, networks).encode()
        return lambda: parse_policy(text, "policy.yaml")

    assert_linear(prepare)


@pytest.mark.parametrize("kind", KINDS)
def test_compiling(kind: str) -> None:
    def prepare(first: int, networks: int) -> Callable[[], Any]:
        policy = parse_policy(text_of(kind, first, networks).encode(), "policy.yaml").policy
        facts = facts_of(first, networks)
        return lambda: compile_policy(policy, facts)

    assert_linear(prepare)


@pytest.mark.parametrize("kind", KINDS)
def test_comparing_with_an_empty_node(kind: str) -> None:
    def prepare(first: int, networks: int) -> Callable[[], Any]:
        policy = parse_policy(text_of(kind, first, networks).encode(), "policy.yaml").policy
        facts = facts_of(first, networks)
        plan = compile_policy(policy, facts)
        node = Actual(links={link.name: ActualLink(link.name, up=True) for link in facts.links})
        return lambda: reconcile(node, plan, Record())

    assert_linear(prepare)


@pytest.mark.parametrize("kind", KINDS)
def test_compiling_one_network_more(kind: str) -> None:
    """What the other networks were compiled to is taken over: of each one only its names are walked through."""
    compiler = Compiler()
    facts = facts_of(USED_TO, MANY)
    before = compiler.plan(
        parse_policy(text_of(kind, USED_TO, MANY - 1).encode(), "policy.yaml").policy, facts
    )
    policy = parse_policy(text_of(kind, USED_TO, MANY).encode(), "policy.yaml").policy
    ids = id_facts(before.ids)
    facts = facts.model_copy(
        update={"ids": ids, "previous_ids": ids, "fwmark_mask": before.fwmark_mask, "rule_bank": 0}
    )
    anew = lines_of(lambda: compile_policy(policy, facts))
    again = lines_of(lambda: compiler.plan(policy, facts))
    assert again <= SHARE_MAX.get(kind, 0.4) * anew, f"{again} lines, {anew} without the plan before"
