# SPDX-License-Identifier: Apache-2.0
"""While policies, sets and the node change, nothing of an egress source leaves by another way or with another address.

Pods open a connection every millisecond or so; every packet that leaves the node is captured behind the last hook.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

from datapath.egress_sets import EgressSets, Verb
from datapath.state import StateDirectory
from tests.netns.leaving import Openers, captured
from tests.netns.nodes import inside
from tools.lab import Lab, command, network
from tools.lab.topology import Pair

pytestmark = [pytest.mark.root, pytest.mark.bpf]

VIPS = {"1.2.3.10", "2001:db8:100::10"}
OTHERS = {"1.2.3.11", "2001:db8:100::11"}
SECOND = {"1.2.4.10", "2001:db8:200::10"}


def entry(name: str, addresses: set[str], sources: str, *, by: str = "public") -> str:
    listed = ", ".join(f'"{address}"' for address in sorted(addresses))
    return f"  - name: {name}\n    network: {by}\n    source_ip: [{listed}]\n    {sources}\n"


POD_A = 'sources: ["10.112.1.2", "fd00:10:112:1::2"]'
BOTH = 'sources: ["10.112.1.0/24", "fd00:10:112:1::/64"]'
WEB = entry("web", VIPS, POD_A)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two networks; both clients can be reached by either, as one outside would be."""
    with Lab(networks=[network(0), network(1)]) as built:
        built.serve("client", built.networks[0].client)
        yield built


@pytest.fixture
def state(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    command.teardown(lab, tmp_path)
    # What was opened without a policy keeps its way, and a port is used again within its half a minute.
    lab.node.call(_forget_everything)


def _forget_everything() -> None:
    with NFCTSocket() as channel:
        channel.flush()


def policy(lab: Lab, *entries: str) -> str:
    return lab.policy(extra="egress:\n" + "".join(entries) if entries else "")


def served(openers: Openers, more: int = 30) -> None:
    """Wait until some more connections were opened: a change must meet traffic."""
    until, deadline = openers.opened + more, time.monotonic() + 30
    while openers.opened < until and time.monotonic() < deadline:
        time.sleep(0.01)


def sends(lab: Lab, *roles: str) -> Openers:
    target: Pair = lab.networks[0].client
    return Openers(lab, [(role, address) for role in roles for address in target])


def test_every_change_of_the_policy(lab: Lab, state: Path) -> None:
    """Pod A is a source before and after each of these changes, so it leaves by a network all the time."""
    outside = lab.networks[0].client
    changes = (
        policy(lab, WEB, entry("more", OTHERS, 'sources: ["10.112.1.3"]')),
        policy(lab, entry("web", OTHERS, POD_A)),
        policy(lab, entry("again", VIPS, BOTH)),
        policy(lab, WEB) + "marks: {mask: 0x7f000000}\n",
        policy(lab, WEB) + "backend: nft\n",
        policy(lab, WEB) + "rules: {priority: 20000}\n",
        policy(lab, WEB),
    )
    command.apply(lab, state, policy(lab, WEB))
    with captured(lab) as capture, sends(lab, "pod_a") as openers:
        for text in changes:
            served(openers)
            command.apply(lab, state, text)
        served(openers)
    right = {("eth0.100", address) for address in VIPS | OTHERS}
    assert capture.other_ways(right, *outside) == []
    assert capture.ways(*outside) == right
    assert openers.seen == VIPS | OTHERS
    assert openers.opened > 300
    assert openers.answered > openers.opened * 0.9


def test_from_the_first_packet_after_the_apply_and_to_the_last_before(lab: Lab, state: Path) -> None:
    """Egress comes and goes: each connection is wholly of one policy, and none has one's address on the other's way."""
    outside = lab.networks[0].client
    command.apply(lab, state, policy(lab))
    with captured(lab) as capture, sends(lab, "pod_a") as openers:
        for text in (policy(lab, WEB), policy(lab), policy(lab, WEB), policy(lab)):
            served(openers)
            command.apply(lab, state, text)
        served(openers)
    ways = capture.ways(*outside)
    by_network = {("eth0.100", address) for address in VIPS}
    assert by_network < ways
    # Without egress: by eth0, with the node's address for IPv4 and, like any routed pod's, as it is.
    assert {device for device, _ in ways - by_network} == {"eth0"}
    assert not {source for device, source in ways if device == "eth0"} & VIPS
    assert openers.opened > 200
    lab.reset_counters()


def test_a_set_that_changes_all_the_time(lab: Lab, state: Path) -> None:
    """Pod B comes and goes with the set, pod A stays in it: each update touches only whom it names."""
    outside = lab.networks[0].client
    command.apply(lab, state, policy(lab, entry("jobs", VIPS, "set: true")))
    sets = EgressSets(StateDirectory(state))
    a, b = ("10.112.1.2", "fd00:10:112:1::2"), ("10.112.1.3", "fd00:10:112:1::3")
    with inside(lab.node.name):
        sets.change("jobs", Verb.SET, a)
        with captured(lab) as capture, sends(lab, "pod_a") as steady:
            served(steady)
            for round_ in range(40):
                sets.change("jobs", Verb.ADD if round_ % 2 else Verb.SET, (*a, *b) if round_ % 2 else a)
            served(steady)
        assert capture.other_ways({("eth0.100", address) for address in VIPS}, *outside) == []
        assert steady.seen == VIPS
        # From the moment in which the update is done.
        with captured(lab) as later, sends(lab, "pod_b") as coming:
            served(coming, 5)
            sets.change("jobs", Verb.SET, (*a, *b))
            since = time.time()
            served(coming, 60)
    left = [packet for address in outside for packet in later.to(address) if packet.at_s >= since]
    assert {(packet.device, packet.source) for packet in left} == {("eth0.100", address) for address in VIPS}
    lab.reset_counters()


def test_without_a_daemon_and_with_a_network_that_is_down(lab: Lab, state: Path) -> None:
    """Nobody runs but the kernel; the network loses its routes, its rule, its address and its device's carrier."""
    outside = lab.networks[0].client
    command.apply(lab, state, policy(lab, WEB))
    table = json.loads(command.datapath(lab, state, "status", "--json").stdout)["networks"][0]["table"]
    breakages: list[tuple[str, ...]] = [
        ("ip", "link", "set", "eth0.100", "down"),
        ("ip", "link", "set", "eth0.100", "up"),
        ("ip", "-4", "route", "flush", "table", str(table)),
        ("ip", "-6", "route", "flush", "table", str(table)),
        ("ip", "-4", "rule", "flush", "protocol", "78"),
        ("ip", "-6", "rule", "flush", "protocol", "78"),
    ]
    with captured(lab) as capture, sends(lab, "pod_a") as openers:
        served(openers)
        for argv in breakages:
            lab.node.run(*argv)
            served(openers)
        command.apply(lab, state, policy(lab, WEB))
        served(openers, 60)
    right = {("eth0.100", address) for address in VIPS}
    assert capture.other_ways(right, *outside) == []
    assert capture.ways(*outside) == right
    assert openers.seen == VIPS


@pytest.mark.slow
@pytest.mark.parametrize("moves", [1, 2])
def test_sources_that_move_to_another_network(lab: Lab, state: Path, moves: int) -> None:
    """Never by the one with the other's address."""
    outside = lab.networks[0].client
    second = entry("web", SECOND, POD_A, by="public2")
    command.apply(lab, state, policy(lab, WEB))
    with captured(lab) as capture, sends(lab, "pod_a") as openers:
        for _ in range(moves):
            for text in (policy(lab, second), policy(lab, WEB)):
                served(openers)
                command.apply(lab, state, text)
        served(openers)
    expected = {("eth0.100", address) for address in VIPS} | {("eth0.200", address) for address in SECOND}
    assert capture.ways(*outside) <= expected
    assert {("eth0.100", address) for address in VIPS} <= capture.ways(*outside)
    lab.reset_counters()
