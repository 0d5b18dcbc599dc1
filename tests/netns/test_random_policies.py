# SPDX-License-Identifier: Apache-2.0
"""Random policies on the real kernel: each applies, reads back, stays, changes into the next, and goes without a trace.

One example is a chain of policies on one node. That is what makes 500 of them affordable: the eBPF program is
loaded again only when the mask changes or its maps are too small. `make test` draws half as many chains, always the
same ones, though not the first of those of `make test-full`: every kind of change is in there many times.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from datapath.controller import Controller
from datapath.errors import CompileError, PolicyError
from datapath.kernel.executor import Executor
from datapath.kernel.observer import observe
from datapath.kernel.sandbox import check_nft
from datapath.plan.model import NetworkIds, Plan
from datapath.plan.render import render_table
from datapath.policy import LoadedPolicy, capacity, deposit, parse_policy
from datapath.reconcile.actual import Record
from datapath.reconcile.diff import reconcile
from datapath.reconcile.steps import ForgetConnections, SyncIngress
from datapath.state import State, StateDirectory
from tests.netns.nodes import Node, inside, node, quick_dump
from tests.sampling import FULL
from tools.lab.dump import difference, dump_namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow]

DEVICES = 12
NAMES = [f"eth{n}" for n in range(1, DEVICES + 1)]
CHAINS = 50 if FULL else 25
POLICIES = 10
BACKENDS = st.sampled_from(["ebpf", "nft", "nft"])
_NFT_OBJECT = re.compile(r"^\t(?:chain|map|set) .*?^\t}", re.MULTILINE | re.DOTALL)
MASKS = (0x0FFF0000, 0x00000F00, 0x80402011, 0x0000001F, 0xFFFF0000)


@st.composite
def addresses(draw: st.DrawFn, number: int) -> dict[str, Any]:
    """VIPs and gateways of either family or both."""
    v4, v6 = f"10.{number}.0", f"2001:db8:{number}:"
    forms4 = [[f"{v4}.0/24"], [f"{v4}.16/28", f"{v4}.64"], [f"{v4}.10-{v4}.29"], [f"{v4}.77"]]
    forms6 = [[f"{v6}:/64"], [f"{v6}:10/124", f"{v6}:77"], [f"{v6}:5-{v6}:9"]]
    families = draw(st.sampled_from(["4", "6", "46"]))
    vips, gateways = [], []
    if "4" in families:
        vips += draw(st.sampled_from(forms4))
        gateways += draw(st.sampled_from([[], [f"{v4}.1"]]))
    if "6" in families:
        vips += draw(st.sampled_from(forms6))
        gateways += draw(st.sampled_from([[], [f"{v6}:1"], ["fe80::1"]]))
    if not gateways:
        return {"vips": vips}
    on_link = [[f"{v4}.0/24", f"{v6}:/64"], [f"{v4}.0/25", "192.0.2.0/24", f"{v6}:/96"]]
    return {"vips": vips, "gateway": gateways, "on_link": draw(st.sampled_from(on_link))}


KEYS = st.fixed_dictionaries(
    {},
    optional={
        "return_path": st.sampled_from(["conntrack", "source", "none"]),
        "track": st.sampled_from(["first", "last"]),
        "strict_arp": st.booleans(),
        "reverse_path": st.fixed_dictionaries(
            {
                "vips": st.sampled_from(["feasible", "strict", "off"]),
                "other": st.sampled_from(["strict", "loose", "off"]),
                "allow": st.sampled_from([[], ["203.0.113.0/24", "2001:db8:ffff::/48"]]),
            }
        ),
    },
)


@st.composite
def networks(draw: st.DrawFn, number: int, mask: int) -> dict[str, Any]:
    """A network on device `number`; all that it may say, but nothing that only another kernel could do."""
    network: dict[str, Any] = {
        "name": draw(st.sampled_from([f"n{number}", f"other-{number}", f"save-{number}"])),
        "interface": f"eth{number}",
        **draw(addresses(number)),
        **draw(KEYS),
    }
    if _may_be_isolated(network):
        # What it cannot be together with is refused, and that is tested elsewhere.
        keys: list[dict[str, Any]] = [
            {},
            {},
            {"isolate_clients": True},
            {"isolate_clients": True, "zone": number},
        ]
        network |= draw(st.sampled_from(keys))
    if draw(st.integers(0, 5)) == 0:
        network["table"] = 5000 + number
    if draw(st.integers(0, 5)) == 0:
        room = min(capacity(mask), 4095)
        network["mark"] = deposit(1 + number * 331 % room, mask)
    return network


def _may_be_isolated(network: dict[str, Any]) -> bool:
    follows = network.get("return_path", "conntrack") == "conntrack" and network.get("track") != "last"
    return follows and "gateway" in network


@st.composite
def egress(draw: st.DrawFn, among: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to three entries, by networks that can carry them."""
    able = [n for n in among if n.get("gateway") and n.get("return_path", "conntrack") == "conntrack"]
    entries = []
    for number in range(draw(st.integers(0, 3)) if able else 0):
        network = draw(st.sampled_from(able))
        own = network["interface"].removeprefix("eth")
        gateway = network["gateway"][0]
        v6 = ":" in gateway
        entry = {
            "name": f"e{number}",
            "network": network["name"],
            "source_ip": draw(
                st.sampled_from(["network", f"2001:db8:{own}::99" if v6 else f"10.{own}.0.99"])
            ),
            "sources": [f"fd00:{number}::/64" if v6 else f"172.16.{number}.0/24"],
            "set": draw(st.booleans()),
        }
        if draw(st.booleans()):
            entry["exclude"] = ["2001:db8:aaaa::/48" if v6 else "192.0.2.0/24"]
        entries.append(entry)
    return entries


@st.composite
def policies(draw: st.DrawFn, mask: int, backend: str) -> LoadedPolicy:
    numbers = draw(st.sets(st.integers(1, DEVICES), min_size=1, max_size=DEVICES))
    body: dict[str, Any] = {
        "version": 1,
        "backend": backend,
        "marks": {"mask": mask},
        "networks": [draw(networks(number, mask)) for number in sorted(numbers)],
    }
    if draw(st.booleans()):
        body["node"] = {"internal": ["172.16.0.0/12", "fd00::/8"]}
    if draw(st.integers(0, 4)) == 0:
        body["rules"] = {"priority": draw(st.sampled_from([3000, 20000]))}
    if "node" in body and (entries := draw(egress(body["networks"]))):
        body["egress"] = entries
    # Pins may clash with each other: the policy refuses that, and it is tested elsewhere.
    marks: set[int] = set()
    for network in body["networks"]:
        if network.get("mark") in marks:
            del network["mark"]
        marks.add(network.get("mark", 0))
    return parse_policy(yaml.safe_dump(body).encode(), "random.yaml")


@st.composite
def chains(draw: st.DrawFn) -> list[LoadedPolicy]:
    """Policies that follow each other; the mask and the backend change now and then."""
    mask, backend = draw(st.sampled_from(MASKS)), draw(BACKENDS)
    chain: list[LoadedPolicy] = []
    for _ in range(POLICIES):
        # Both mean a new program, which costs as much as ten policies.
        if draw(st.integers(0, 39)) == 0:
            mask, backend = draw(st.sampled_from(MASKS)), draw(BACKENDS)
        chain.append(draw(policies(mask, backend)))
    return chain


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
def test_chains_of_policies(ground: Ground, chain: list[LoadedPolicy]) -> None:
    with tempfile.TemporaryDirectory() as directory, inside(ground.node.namespace.name):
        states = StateDirectory(Path(directory))
        controller = Controller(states)
        try:
            before = Plan(0)
            for policy in chain:
                before = _step(ground, controller, policy, before)
            # What is carried over from the policy before has nothing to come from on a fresh node.
            _assert_as_fresh(ground, before.settled)
        finally:
            controller.teardown()
        assert difference(ground.empty, quick_dump(NAMES)) == ""


def _step(ground: Ground, controller: Controller, policy: LoadedPolicy, before: Plan) -> Plan:
    """Apply one policy and look at the kernel."""
    plan = controller.apply(policy).plan
    ground.applied += 1
    status = controller.status()
    assert status is not None
    assert [step.describe() for step in status.steps] == []
    if ground.applied % 5 == 0:
        assert [step.describe() for step in controller.apply(policy).steps] == []
    _assert_ids_stay(before, plan, policy)
    text = render_table(plan.table) if plan.table else ""
    if len(ground.seen) < 20 and text not in ground.seen:
        # In an empty namespace, as nft-dry-run does; the kernel has taken it above, so a sample is enough.
        ground.seen.add(text)
        check_nft(text)
    return plan


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
        _converge(plan, Record())
        fresh = quick_dump(NAMES)
        # The twin's record is not kept, so its sysctls are put back by hand.
        changes = reconcile(observe(plan, State()), plan, Record())
        assert [s for s in changes.steps if not isinstance(s, SyncIngress)] == []
    try:
        assert (
            difference(
                {part: _normal(part, fresh[part]) for part in parts},
                {part: _normal(part, reached[part]) for part in parts},
            )
            == ""
        )
    finally:
        with inside(ground.twin.namespace.name):
            _converge(Plan(0), Record())
            _put_back(ground)


def _converge(plan: Plan, record: Record) -> None:
    changes = reconcile(observe(plan, State()), plan, record)
    with Executor() as executor:
        for step in changes.steps:
            if not isinstance(step, SyncIngress | ForgetConnections):
                executor.run(step)


def _put_back(ground: Ground) -> None:
    for line in ground.empty["sysctls"].splitlines():
        path, value = line.split(" = ", 1)
        if path.endswith(("rp_filter", "accept_local", "arp_ignore", "arp_announce")):
            Path(path).write_text(value)


def _normal(part: str, text: str) -> str:
    """Without what only tells how old things are: rules of one priority exclude each other, chains have names."""
    if part == "nft":
        return "\n".join(sorted(_NFT_OBJECT.findall(text)))
    return "\n".join(sorted(text.splitlines()))


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
