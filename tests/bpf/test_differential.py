# SPDX-License-Identifier: Apache-2.0
"""The loaded program and the reference model agree on every packet: verdict, action, mark and counters.

`DATAPATH_DIFFERENTIAL_SEED` repeats a run, `DATAPATH_DIFFERENTIAL_PACKETS` makes a longer one. A disagreement prints
the case as JSON: append it to `regressions.json`, which is run first.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest

from datapath.kernel import tc
from datapath.kernel.bpf import Counter, IngressTables, resolve
from datapath.observe.reference import judge
from datapath.plan.ingress import Verdict
from tests.bpf.cases import from_json, to_json
from tests.bpf.conftest import run
from tests.bpf.generator import MASK, Devices, random_arrival, random_program
from tests.bpf.harness import TC_ACT_SHOT, TC_ACT_UNSPEC, harness
from tests.bpf.routes import RouteFib, read_fib

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.observe.reference import Arrival, Judgement
    from datapath.plan.ingress import IngressProgram
    from tests.bpf.harness import Harness

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PACKETS: Final = int(os.environ.get("DATAPATH_DIFFERENTIAL_PACKETS", "102000"))
SEED: Final = int(os.environ.get("DATAPATH_DIFFERENTIAL_SEED", str(random.SystemRandom().getrandbits(32))))
PACKETS_PER_PROGRAM: Final = 200
DEVICES: Final = Devices(trunk="trunk0", networks=("net0", "net1", "trunk0"))
REGRESSIONS: Final = Path(__file__).with_name("regressions.json")

_ADDRESSES: Final = (
    ("net0", "192.0.2.1/24"),
    ("net0", "2001:db8:1:1::1/64"),
    ("net1", "10.112.3.1/24"),
    ("net1", "fd00:10:112:3::1/64"),
)
_ROUTES: Final = (
    "198.51.100.0/24 via 192.0.2.254 dev net0",
    "198.51.100.128/25 via 10.112.3.254 dev net1",
    "203.0.113.0/24 dev trunk0",
    "blackhole 100.64.0.0/10",
    "unreachable 10.96.0.0/12",
    "2001:db8:2::/48 via 2001:db8:1:1::fe dev net0",
    "2001:db8:2:8000::/49 via fd00:10:112:3::fe dev net1",
    "fd00:10:96::/112 dev trunk0",
    "blackhole 64:ff9b::/96",
)
_ALL_FORWARDING: Final = tuple((device, version) for device in DEVICES.networks for version in (4, 6))
#: More routes, and where forwarding is on.
VARIANTS: Final[dict[str, tuple[tuple[str, ...], tuple[tuple[str, int], ...]]]] = {
    "default-by-net0": (
        ("default via 192.0.2.254 dev net0", "default via 2001:db8:1:1::fe dev net0"),
        _ALL_FORWARDING,
    ),
    "default-by-net1": (("default via 10.112.3.254 dev net1", "default dev net1 metric 77"), _ALL_FORWARDING),
    "no-default": ((), _ALL_FORWARDING),
    "forwarding-off": (("default dev net1",), (("net1", 4), ("net0", 6), ("trunk0", 4), ("trunk0", 6))),
}


@pytest.fixture(scope="module")
def lab(module_node: str) -> str:
    """Three devices with addresses and routes of both families."""
    for device in DEVICES.networks:
        run("ip", "link", "add", device, "type", "veth", "peer", "name", f"{device}-peer")
        run("ip", "link", "set", f"{device}-peer", "up")
        run("ip", "link", "set", device, "up")
    for device, address in _ADDRESSES:
        run("ip", "address", "add", address, "dev", device, *(["nodad"] if ":" in address else []))
    for route in _ROUTES:
        _route("add", route)
    return module_node


def _route(verb: str, route: str) -> None:
    # A route without an address in it is meant for both families.
    families = ["-6"] if ":" in route else ["-4"] if "." in route else ["-4", "-6"]
    for family in families:
        run("ip", family, "route", verb, *route.split())


@contextlib.contextmanager
def _variant(name: str) -> Iterator[RouteFib]:
    routes, forwarding = VARIANTS[name]
    for route in routes:
        _route("add", route)
    try:
        yield read_fib(DEVICES.networks, forwarding=forwarding)
    finally:
        for route in routes:
            _route("delete", route)


@functools.cache
def _ifindex(ifname: str) -> int:
    return socket.if_nametoindex(ifname)  # the lab is one and stays


@pytest.fixture(scope="module")
def program(lab: str) -> Iterator[Harness]:
    assert lab
    with harness(MASK, IngressTables()) as loaded:
        yield loaded


def _disagreement(
    loaded: Harness, policy: IngressProgram, arrival: Arrival, fib: RouteFib
) -> tuple[str, Judgement]:
    """What the kernel does otherwise than the model says; empty if nothing."""
    expected = judge(policy, arrival, fib)
    before = loaded.counts(expected.slot or 0)
    outcome = loaded.run(
        arrival.data,
        ifindex=_ifindex(arrival.ifname),
        mark=arrival.mark,
        metadata_tag=arrival.metadata_tag,
        gso_segs=2 if arrival.is_merged else 0,
    )
    after = loaded.counts(expected.slot or 0)
    counted = {} if expected.slot is None else {expected.verdict: 2 if arrival.is_merged else 1}
    actual = {
        verdict: after[verdict].packets - before[verdict].packets
        for verdict in Verdict
        if after[verdict] != before[verdict]
    }
    problems = []
    if outcome.action != (TC_ACT_UNSPEC if expected.passes else TC_ACT_SHOT):
        problems.append(f"action {outcome.action}")
    if outcome.mark != expected.mark:
        problems.append(f"mark {outcome.mark:#x}")
    if actual != counted:
        problems.append(f"counted {actual}")
    return ", ".join(problems), expected


def _check(loaded: Harness, name: str, policy: IngressProgram, arrival: Arrival, fib: RouteFib) -> Verdict:
    problem, expected = _disagreement(loaded, policy, arrival, fib)
    if problem:
        case = json.dumps(to_json(name, policy, arrival))
        pytest.fail(
            f"seed {SEED}: the kernel: {problem}; the model: {expected}\nto be kept as a regression:\n{case}"
        )
    return expected.verdict


def test_kept_disagreements_agree(program: Harness) -> None:
    cases = json.loads(REGRESSIONS.read_text(encoding="utf-8"))
    assert cases
    for case in cases:
        name, policy, arrival = from_json(case)
        with _variant(name) as fib:
            program.loaded.write_tables(resolve(policy, tc.ifindexes()))
            _check(program, name, policy, arrival, fib)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_kernel_and_model_agree_on_generated_packets(program: Harness, name: str) -> None:
    rng = random.Random(f"{SEED}-{name}")
    share = PACKETS // len(VARIANTS)
    seen: dict[Verdict, int] = dict.fromkeys(Verdict, 0)
    with _variant(name) as fib:
        ifindexes = tc.ifindexes()
        for _ in range(-(-share // PACKETS_PER_PROGRAM)):
            policy = random_program(rng, DEVICES)
            program.loaded.write_tables(resolve(policy, ifindexes))
            for _ in range(PACKETS_PER_PROGRAM):
                arrival = random_arrival(rng, policy, DEVICES)
                seen[_check(program, name, policy, arrival, fib)] += 1
    # A generator that never gets to a verdict would make this test an empty one.
    assert min(seen.values()) >= (share // 500 if share >= 20000 else 0), seen


def test_bytes_are_counted(program: Harness) -> None:
    policy = random_program(random.Random(1), DEVICES)
    ifindexes = tc.ifindexes()
    with _variant("no-default") as fib:
        program.loaded.write_tables(resolve(policy, ifindexes))
        rng = random.Random(2)
        for _ in range(300):
            arrival = random_arrival(rng, policy, DEVICES)
            expected = judge(policy, arrival, fib)
            if expected.slot is None:
                continue
            before = program.counts(expected.slot)[expected.verdict]
            program.run(
                arrival.data,
                ifindex=ifindexes[arrival.ifname],
                metadata_tag=arrival.metadata_tag,
                gso_segs=2 if arrival.is_merged else 0,
            )
            grown = Counter(packets=2 if arrival.is_merged else 1, bytes=len(arrival.data))
            assert program.counts(expected.slot)[expected.verdict] == before + grown
