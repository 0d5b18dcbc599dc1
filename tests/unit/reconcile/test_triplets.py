# SPDX-License-Identifier: Apache-2.0
"""Current state, desired policy, expected steps in order: one readable folder a kind of change.

A case has `current.yaml` (the policy that the node is in the state of, or nothing, and what happened to the node
since), `desired.yaml` (the policy) and `steps` (what an apply does, in order). After a change that is meant:
`python -m tests.unit.reconcile.test_triplets --update`, then `git diff tests/unit/reconcile/triplets`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import yaml

from datapath.compiler import compile_policy
from datapath.kernel.executor import Executor
from datapath.plan.model import Plan
from datapath.plan.rtnl import VrfLink
from datapath.policy import parse_policy
from datapath.reconcile.actual import ActualLink
from datapath.reconcile.conflicts import find_conflicts
from datapath.reconcile.diff import ChangeSet, reconcile
from datapath.reconcile.steps import NftTransaction, Step
from datapath.state import State
from tests.fake_kernel.kernel import PER_DEVICE, FakeKernel

FOLDER = Path(__file__).parent / "triplets"
CASES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
DEVICES = ("eth1", "eth2", "eth3")


def bare_node(devices: tuple[str, ...] = DEVICES) -> FakeKernel:
    """Devices that are up, kernel reverse-path filter strict everywhere."""
    keys = [
        f"net/ipv4/conf/{name}/{key}" for name in ("all", "default", "lo", *devices) for key in PER_DEVICE
    ]
    keys += [f"net/ipv6/conf/{name}/keep_addr_on_down" for name in devices]
    keys += ["net/ipv4/tcp_l3mdev_accept", "net/ipv4/udp_l3mdev_accept"]
    sysctls = {key: "1" if key.endswith("/rp_filter") else "0" for key in keys}
    return FakeKernel([ActualLink(name, up=True) for name in ("lo", *devices)], sysctls)


class Apply:
    """A node, and what applies remember of it."""

    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel
        self.state = State()

    def plan(self, text: str) -> Plan:
        facts = self.kernel.facts(self.state)
        return (
            compile_policy(parse_policy(text.encode(), "policy.yaml").policy, facts)
            if text
            else Plan(facts.fwmark_mask)
        )

    def changes(self, plan: Plan) -> ChangeSet:
        return reconcile(self.kernel.observe(plan, self.state), plan, self.state.record)

    def carry_out(self, text: str) -> tuple[Step, ...]:
        """Make the node as the policy says, and return what was done."""
        changes = self.changes(self.plan(text))
        with pytest.MonkeyPatch.context() as patch:
            self.kernel.serve(patch)
            with Executor() as executor:
                for step in changes.steps:
                    executor.run(step)
        self.state = State(record=changes.after)
        return changes.steps


def happen(kernel: FakeKernel, events: list[dict[str, str]]) -> None:
    """What others do to the node meanwhile."""
    for event in events:
        ((verb, name),) = event.items()
        if verb == "down":
            kernel.device_down(name)
        elif verb == "delete device":
            kernel.device_deleted(name)
        elif verb == "flush ruleset":
            kernel.nft.table = None
        elif verb == "make device":
            kernel.device_made(ActualLink(name, up=True, kind="dummy"))
        elif verb == "make VRF":
            vrf, table = name.split()
            kernel.add_link(VrfLink(vrf, int(table), is_made=False))
        elif verb == "move":
            device, _, vrf = name.partition(" ")
            kernel.device_moved(device, vrf)
        elif verb == "detach program":
            del kernel.ingress.attached[name]
        else:
            raise ValueError(verb)


def result(case: str) -> str:
    """The steps, the conflicts and the devices that are waited for, one a line."""
    current = yaml.safe_load((FOLDER / case / "current.yaml").read_text(encoding="utf-8")) or {}
    site = Apply(bare_node())
    if current.get("policy"):
        site.carry_out(current["policy"])
    happen(site.kernel, current.get("since", []))
    plan = site.plan((FOLDER / case / "desired.yaml").read_text(encoding="utf-8"))
    conflicts = find_conflicts(site.kernel.observe(plan, site.state), plan, site.state.record)
    changes = site.changes(plan)
    lines = [f"refused: {conflict}" for conflict in conflicts]
    lines += [f"waits for {name}" for name in sorted(changes.waiting)]
    for step in changes.steps:
        lines.append(step.describe())
        if isinstance(step, NftTransaction):
            lines += [f"    {object_}" for object_ in touched(step)]
    return "\n".join(lines or ["nothing to do"]) + "\n"


def touched(step: NftTransaction) -> list[str]:
    """What a transaction does to which object, without rules and elements: those are rulesets/' matter."""
    words = [line.split() for line in step.text.splitlines()]
    return list(dict.fromkeys(" ".join((w[0], w[1], w[4] if len(w) > 4 else "table")) for w in words))


@pytest.mark.parametrize("case", CASES)
def test_steps_are_the_expected_ones(case: str) -> None:
    assert result(case) == (FOLDER / case / "steps").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_after_the_steps_nothing_is_left_to_do(case: str) -> None:
    current = yaml.safe_load((FOLDER / case / "current.yaml").read_text(encoding="utf-8")) or {}
    desired = (FOLDER / case / "desired.yaml").read_text(encoding="utf-8")
    site = Apply(bare_node())
    if current.get("policy"):
        site.carry_out(current["policy"])
    happen(site.kernel, current.get("since", []))
    plan = site.plan(desired)
    if find_conflicts(site.kernel.observe(plan, site.state), plan, site.state.record):
        return
    site.carry_out(desired)
    site.carry_out(desired)  # a VLAN device may have to exist first
    assert site.carry_out(desired) == ()


def many(count: int, changed: int | None, chance: random.Random) -> str:
    """A policy of so many networks, one of them changed in a random way."""
    lines = ["version: 1", f"backend: {chance.choice(['ebpf', 'nft'])}", "networks:"]
    for number in range(count):
        gateway, vips, extra = f"10.{number}.0.1", f"10.{number}.0.0/24", ""
        if number == changed:
            what = chance.choice(["gateway", "vips", "extra"])
            gateway = f"10.{number}.0.9" if what == "gateway" else gateway
            vips = f"{vips}, 192.0.2.0/28" if what == "vips" else vips
            extra = ", strict_arp: true" if what == "extra" else ""
        lines.append(
            f"  - {{name: net{number}x, interface: dev{number}x, vips: [{vips}], gateway: {gateway}{extra}}}"
        )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("seed", range(12))
def test_one_network_of_many_touches_only_its_own_objects(seed: int) -> None:
    """No step, and no line of a transaction, names another network, its device or its addresses."""
    count = 30
    changed = random.Random(seed).randrange(count)
    site = Apply(bare_node(tuple(f"dev{number}x" for number in range(count))))
    site.carry_out(many(count, None, random.Random(seed)))
    steps = site.carry_out(many(count, changed, random.Random(seed)))
    assert steps
    others = [word for n in range(count) if n != changed for word in (f"net{n}x", f"dev{n}x", f"10.{n}.0.")]
    for step in steps:
        text = step.text if isinstance(step, NftTransaction) else step.describe()
        if "eBPF program" in text:
            continue  # its maps are compared element by element; tests/bpf
        assert not [word for word in others if word in text], text
    assert len(steps) < 10


def main() -> int:
    """Write what the cases come to now."""
    if sys.argv[1:] != ["--update"]:
        sys.stderr.write("usage: python -m tests.unit.reconcile.test_triplets --update\n")
        return 2
    for case in CASES:
        (FOLDER / case / "steps").write_text(result(case), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
