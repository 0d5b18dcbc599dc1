# SPDX-License-Identifier: Apache-2.0
"""Random policies on the real kernel: each applies, reads back, stays, changes into the next, and goes without a trace.

One example is a chain of policies on one node. That is what makes 500 of them affordable: the eBPF program is
loaded again only when the mask changes or its maps are too small. `make test` draws half as many chains, always the
same ones, though not the first of those of `make test-full`: every kind of change is in there many times. VRFs, which
not every kernel has, are drawn in `tests/vm/test_random_vm.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_network
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from datapath.controller import Controller
from datapath.egress_sets import EgressSets, Verb
from datapath.errors import CompileError, PolicyError
from datapath.kernel.sandbox import check_nft
from datapath.plan.model import NetworkIds, Plan
from datapath.plan.render import render_table
from datapath.policy import LoadedPolicy, parse_policy
from datapath.reconcile.actual import Record
from datapath.service.healer import Healer
from datapath.state import StateDirectory
from tests.netns.draws import CHAINS, DEVICES, POLICIES, Turn, chains
from tests.netns.fresh import converge, differences, normal
from tests.netns.nodes import Node, inside, node, quick_dump
from tools.lab.dump import difference, dump_namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow]

NAMES = [f"eth{n}" for n in range(1, DEVICES + 1)]


@dataclass(repr=False)
class Ground:
    """The node, its twin for fresh applies, and how they looked when they were empty."""

    node: Node
    twin: Node
    empty: dict[str, str]
    applied: int = 0
    seen: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with node(DEVICES) as one, node(DEVICES) as two:
        with inside(one.namespace.name):
            empty = quick_dump(NAMES)
        full = dump_namespace(one.namespace)
        ground = Ground(one, two, empty)
        yield ground
        # Once for all examples, what takes a process for each part: nothing at all is left.
        assert difference(full, dump_namespace(one.namespace)) == ""
        # Nothing was applied where another process of the run has this test.
        assert ground.applied == 0 or ground.applied >= CHAINS * POLICIES


@pytest.mark.timeout(900)
# Or it would take the place of what failed.
@pytest.mark.filterwarnings("default:Generating overly large repr")
@settings(
    max_examples=CHAINS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    # Always the same examples: what fails fails again, and making it smaller takes five minutes of a CI's time.
    phases=(Phase.explicit, Phase.generate),
)
@given(chain=chains())
def test_chains_of_policies(ground: Ground, chain: list[Turn]) -> None:
    with tempfile.TemporaryDirectory() as directory, inside(ground.node.namespace.name):
        states = StateDirectory(Path(directory))
        controller = Controller(states)
        try:
            before = Plan(0)
            for turn in chain:
                before = _step(ground, controller, turn.policy, before)
                _go_on(states, turn)
            status = controller.status()
            assert status is not None
            # What is carried over from the policy before has nothing to come from on a fresh node.
            _assert_as_fresh(ground, status.plan.settled)
        finally:
            controller.teardown()
        assert difference(ground.empty, quick_dump(NAMES)) == ""


def _step(ground: Ground, controller: Controller, policy: LoadedPolicy, before: Plan) -> Plan:
    """Apply one policy and look at the kernel."""
    plan = controller.apply(policy).plan
    ground.applied += 1
    _assert_no_drift(controller)
    if ground.applied % 5 == 0:
        assert [step.describe() for step in controller.apply(policy).steps] == []
    _assert_ids_stay(before, plan, policy)
    text = render_table(plan.table) if plan.table else ""
    if len(ground.seen) < 20 and text not in ground.seen:
        # In an empty namespace, as nft-dry-run does; the kernel has taken it above, so a sample is enough.
        ground.seen.add(text)
        check_nft(text)
    return plan


def _assert_no_drift(controller: Controller) -> None:
    status = controller.status()
    assert status is not None
    assert [step.describe() for step in status.steps] == []


def _go_on(states: StateDirectory, turn: Turn) -> None:
    """Sets of `egress` change, and gateways go down: until the next apply, which has no daemon beside it."""
    sets = EgressSets(states)
    for name, verb, addresses in turn.members:
        before = set(sets.get(name).members)
        members = set(sets.change(name, verb, addresses).members)
        given = {ip_network(address) for address in addresses}
        assert members == {Verb.SET: given, Verb.ADD: before | given, Verb.REMOVE: before - given}[verb]
    if turn.down:
        healer = Healer(states)
        try:
            healer.set_down(turn.down)
            look = healer.look()
        finally:
            healer.close()
        assert (look.failed, look.held, look.conflicts) == ((), (), ())
    if turn.members or turn.down:
        _assert_no_drift(Controller(states))


def _assert_ids_stay(before: Plan, after: Plan, policy: LoadedPolicy) -> None:
    pinned_marks = {network.mark for network in policy.policy.networks}
    pinned_tables = {network.table for network in policy.policy.networks}
    pinned_zones = {network.zone for network in policy.policy.networks}
    old = {ids.name: ids for ids in before.ids}
    for ids in after.ids:
        known = old.get(ids.name, NetworkIds(ids.name))
        if known.slot and ids.slot:
            assert ids.slot == known.slot
        if known.zone and ids.zone and not {known.zone, ids.zone} & pinned_zones:
            assert ids.zone == known.zone
        if known.table and ids.table and not {known.table, ids.table} & pinned_tables:
            assert ids.table == known.table
        same_mask = before.fwmark_mask == after.fwmark_mask
        if same_mask and known.fwmark and ids.fwmark and not {known.fwmark, ids.fwmark} & pinned_marks:
            assert ids.fwmark == known.fwmark


def _assert_as_fresh(ground: Ground, plan: Plan) -> None:
    """The kernel after the whole chain is as after one apply on a new node; the program is compared by status."""
    parts = ("rules", "routes", "nft", "sysctls")
    reached = quick_dump(NAMES)
    with inside(ground.twin.namespace.name):
        converge(plan, Record())
        fresh = quick_dump(NAMES)
        # The twin's record is not kept, so its sysctls are put back by hand.
        assert differences(plan) == []
    try:
        assert (
            difference(
                {part: normal(part, fresh[part]) for part in parts},
                {part: normal(part, reached[part]) for part in parts},
            )
            == ""
        )
    finally:
        with inside(ground.twin.namespace.name):
            converge(Plan(0), Record())
            _put_back(ground)


def _put_back(ground: Ground) -> None:
    for line in ground.empty["sysctls"].splitlines():
        path, value = line.split(" = ", 1)
        if path.endswith(("rp_filter", "accept_local", "arp_ignore", "arp_announce")):
            Path(path).write_text(value)


def test_refusals_change_nothing(ground: Ground) -> None:
    """A policy that only this host makes impossible: the mask has no value left beside the pins."""
    text = {
        "version": 1,
        "marks": {"mask": 0xFFFF0000},
        "networks": [
            {
                "name": "far",
                "interface": "eth1",
                "vips": ["10.1.0.0/24"],
                "gateway": "10.1.0.1",
                "mark": 0xFFFF0000,
            }
        ],
    }
    with tempfile.TemporaryDirectory() as directory, inside(ground.node.namespace.name):
        with pytest.raises(PolicyError) as caught:
            Controller(StateDirectory(Path(directory))).apply(
                parse_policy(yaml.safe_dump(text).encode(), "far.yaml")
            )
        assert isinstance(caught.value.__cause__, CompileError)
        assert difference(ground.empty, quick_dump(NAMES)) == ""
