# SPDX-License-Identifier: Apache-2.0
"""Real packets through a node with a real policy: both backends do what the reference model says.

`DATAPATH_NETNS_SEED` repeats a run, `DATAPATH_NETNS_PACKETS` makes a longer one. A disagreement prints the policy,
the packet and what was expected.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from datapath.controller import Controller
from datapath.kernel.counters import read_counters
from datapath.observe.reference import Arrival, Judgement, judge
from datapath.plan.ingress import Verdict
from datapath.plan.model import Plan
from datapath.policy import LoadedPolicy, parse_policy
from datapath.state import StateDirectory
from tests.netns.differential.fib import NodeFib, read_node_fib
from tests.netns.differential.ground import PREROUTING, Ground, Nft, ground, until
from tests.netns.differential.oddities import FROM_ELSEWHERE, ODDITIES
from tests.netns.differential.policies import DEVICES, LINES, VARIANTS, random_policy
from tests.netns.differential.traffic import Sent, Traffic

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow]

PACKETS: Final = int(os.environ.get("DATAPATH_NETNS_PACKETS", "5000"))
SEED: Final = int(os.environ.get("DATAPATH_NETNS_SEED", str(random.SystemRandom().getrandbits(32))))
PACKETS_PER_POLICY: Final = 250

#: Malformed packets do not get as far as nftables. `feasible` is chosen only where the network's table has a default
#: route for every family of VIPs (else it means `strict`), so that no source is unreachable.
_NEVER: Final = frozenset({Verdict.MALFORMED, Verdict.VIP_UNREACHABLE})

ONLY_STRICT: Final = """\
version: 1
backend: {backend}
networks:
  - name: strict
    interface: net0
    vips: [198.51.100.0/24, "2001:db8:2::/64"]
    gateway: [198.51.100.1, "2001:db8:2::1"]
"""

Counted = dict[tuple[str, Verdict], int]


@pytest.fixture(scope="module")
def field() -> Iterator[Ground]:
    with ground(DEVICES, LINES) as built:
        built.observe(PREROUTING)
        yield built


@dataclass(frozen=True, slots=True)
class Expected:
    """What the model says of one packet: its verdict where it is counted, and its mark."""

    network: str | None
    judgement: Judgement


@dataclass
class Trial:
    """One policy in force on the field.

    The nft backend looks at a packet once it is whole, the eBPF program at each of its fragments.
    """

    field: Ground
    nft: Nft
    policy: LoadedPolicy
    plan: Plan
    fib: NodeFib

    def expected(self, packet: Sent) -> Expected:
        judged = {
            judge(self.plan.ingress, Arrival(packet.device, frame), self.fib) for frame in packet.frames
        }
        assert len(judged) == 1, f"fragments of {packet} are not alike: {judged}"
        judgement = judged.pop()
        names = {network.slot: network.name for network in self.plan.ingress.networks}
        return Expected(names.get(judgement.slot or 0), judgement)

    def counted(self) -> Counted:
        return {
            (network, verdict): counter.packets
            for network, counters in read_counters(self.plan).items()
            for verdict, counter in counters.items()
            if counter.packets
        }

    def times(self, packet: Sent) -> int:
        """How often one packet is counted."""
        return len(packet.frames) if self.plan.backend == "ebpf" else 1

    def send(self, packets: list[Sent], total: int) -> Counted:
        """What the counters grow by."""
        before = Counter(self.counted())
        for packet in packets:
            for frame in packet.frames:
                self.field.send(packet.device, frame)
        until(lambda: sum(self.counted().values()) >= before.total() + total)
        return dict(Counter(self.counted()) - before)

    def run(self, packets: list[Sent]) -> Counter[Verdict]:
        """Send all, those of one verdict at a time; how many there were of each."""
        expected = {packet: self.expected(packet) for packet in packets}
        groups: dict[Verdict, list[Sent]] = {}
        for packet in packets:
            groups.setdefault(expected[packet].judgement.verdict, []).append(packet)
        self.nft.seen()
        for group in groups.values():
            wanted: Counter[tuple[str, Verdict]] = Counter()
            for packet in group:
                network = expected[packet].network
                if network is not None:
                    wanted[network, expected[packet].judgement.verdict] += self.times(packet)
            actual = self.send(group, wanted.total())
            if actual != dict(wanted):
                self._blame(group, expected)
                pytest.fail(f"seed {SEED}: counted {actual}, not {dict(wanted)}; but each alone is right")
        seen = self.nft.seen()
        for packet, wish in expected.items():
            mark = wish.judgement.mark if wish.judgement.passes else None
            if seen.get(packet.number) != mark:
                self._fail(packet, wish, f"it got through with mark {seen.get(packet.number)}")
        return Counter(wish.judgement.verdict for wish in expected.values())

    def _blame(self, group: list[Sent], expected: dict[Sent, Expected]) -> None:
        """Send the packets of a group one by one and fail at the first that is treated otherwise."""
        for packet in group:
            wish = expected[packet]
            wanted = (
                {} if wish.network is None else {(wish.network, wish.judgement.verdict): self.times(packet)}
            )
            actual = self.send([packet], sum(wanted.values()))
            if actual != wanted:
                self._fail(packet, wish, f"counted {actual}")

    def _fail(self, packet: Sent, wish: Expected, got: str) -> None:
        frames = "\n".join(frame.hex() for frame in packet.frames)
        pytest.fail(
            f"seed {SEED}, backend {self.plan.backend}, on {packet.device}:\n{frames}\n"
            f"expected {wish}\ngot: {got}\npolicy:\n{self.policy.source.text}"
        )


def _switch_routes(field: Ground, verb: str, variant: tuple[str, ...]) -> None:
    field.node.ip(line.format(verb) for line in variant)


@pytest.mark.parametrize("backend", ["ebpf", "nft"])
def test_the_node_does_what_the_model_says(field: Ground, tmp_path: Path, backend: str) -> None:
    controller = Controller(StateDirectory(tmp_path))
    nft = Nft()
    verdicts: Counter[Verdict] = Counter()
    # The same policies and packets for both backends.
    rng = random.Random(SEED)
    variants = itertools.cycle(VARIANTS)
    for start in range(1, PACKETS, PACKETS_PER_POLICY):
        variant = next(variants)
        _switch_routes(field, "add", variant)
        try:
            policy = random_policy(rng, backend)
            plan = controller.apply(policy).plan
            trial = Trial(field, nft, policy, plan, read_node_fib())
            traffic = Traffic(rng, plan.ingress, DEVICES)
            verdicts += trial.run(list(traffic.take(PACKETS_PER_POLICY, start % 60000)))
        finally:
            _switch_routes(field, "del", variant)
    controller.teardown()
    # A generator that never gets to a verdict would make this test an empty one.
    least = min(verdicts[verdict] for verdict in Verdict if verdict not in _NEVER)
    assert least >= (10 if PACKETS >= 5000 else 0), verdicts


@pytest.mark.parametrize("backend", ["ebpf", "nft"])
def test_where_the_backends_differ(field: Ground, tmp_path: Path, backend: str) -> None:
    controller = Controller(StateDirectory(tmp_path))
    policy = parse_policy(ONLY_STRICT.format(backend=backend).encode(), "policy.yaml")
    plan = controller.apply(policy).plan
    trial = Trial(field, Nft(), policy, plan, read_node_fib())
    try:
        for oddity in ODDITIES:
            wanted = Counter(oddity.ebpf if backend == "ebpf" else (oddity.nft,))
            judged = [
                judge(plan.ingress, Arrival(oddity.sent.device, frame), trial.fib).verdict
                for frame in oddity.sent.frames
            ]
            assert judged == list(oddity.ebpf), oddity.name
            counted = trial.send([oddity.sent], wanted.total())
            assert {verdict: count for (_, verdict), count in counted.items()} == wanted, oddity.name
    finally:
        controller.teardown()


@pytest.mark.parametrize(("backend", "verdict"), [("ebpf", Verdict.PASS), ("nft", Verdict.RPF_STRICT)])
def test_a_device_that_does_not_forward(
    field: Ground, tmp_path: Path, backend: str, verdict: Verdict
) -> None:
    """bpf_fib_lookup does not look there; the model calls it `UNKNOWN`."""
    controller = Controller(StateDirectory(tmp_path))
    policy = parse_policy(ONLY_STRICT.format(backend=backend).encode(), "policy.yaml")
    plan = controller.apply(policy).plan
    trial = Trial(field, Nft(), policy, plan, read_node_fib())
    switches = {4: "net/ipv4/conf/net0/forwarding", 6: "net/ipv6/conf/net0/forwarding"}
    try:
        for packet in FROM_ELSEWHERE:
            assert trial.send([packet], 1) == {("strict", Verdict.RPF_STRICT): 1}
            field.node.sysctl({switches[packet.number.version]: 0})
            assert trial.send([packet], 1) == {("strict", verdict): 1}
    finally:
        field.node.sysctl(dict.fromkeys(switches.values(), 1))
        controller.teardown()
