# SPDX-License-Identifier: Apache-2.0
"""The fake kernel against the running one: the same steps, valid and not, on both.

After every step the answer (done, or the error number) and everything that the engine observes must be equal.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from datapath.compiler import compile_policy
from datapath.errors import DatapathError, KernelError
from datapath.kernel.executor import Executor
from datapath.kernel.observer import observe, observe_facts
from datapath.plan.model import Plan
from datapath.reconcile.actual import Actual, ActualLink, Record, Saved
from datapath.reconcile.batches import batches
from datapath.reconcile.diff import reconcile
from datapath.reconcile.steps import NftTransaction, Step, SyncIngress
from datapath.state import State
from tests.fake_kernel.kernel import PER_DEVICE, FakeKernel
from tests.fake_kernel.policies import POLICIES, policy
from tests.kernel_features import kernel_has
from tests.netns.nodes import Node, inside, node

pytestmark = [pytest.mark.root, pytest.mark.slow]

DEVICES = ("eth1", "eth2", "eth3", "eth4")
#: Keys that the fake knows of every device, asked for although nothing of ours changed them.
KEYS = frozenset(
    f"net/ipv4/conf/{device}/{name}" for device in ("all", "default", *DEVICES) for name in PER_DEVICE
)
#: eth1 and eth2 are the ends of one cable.
_PAIR = ("eth1", "eth2")
EVENTS = (
    ("down", "eth1"),
    ("delete", "eth3.5"),
    ("down", "eth3"),
    ("delete", "eth2"),
    ("make", "eth1"),
    ("up", "eth1"),
    ("up", "eth2"),
    ("up", "eth3"),
)
_ERRNO_OF = {os.strerror(code): code for code in errno.errorcode} | {
    "element does not exist": errno.ENOENT,  # nft itself says these two, of sets with intervals
    "interval overlaps with an existing one": errno.EEXIST,
}


def watching(record: Record) -> State:
    """A state that makes an observation read every sysctl that is modelled."""
    extra = {key: Saved("", "") for key in KEYS if key not in record.sysctls}
    return State(record=dataclasses.replace(record, sysctls={**extra, **record.sysctls}))


#: What of an observation the fake models; not egress steering, nor how others use marks and tables.
MODELLED = ("table", "rules", "routes", "foreign_rules", "sysctls")
OF_A_LINK = ("up", "kind", "parent", "vlan_id", "vlan_protocol", "port_of")
OF_FACTS = ("ids", "fwmark_mask", "previous_ids", "previous_mask", "rule_bank", "has_rule_tree")


def comparable(actual: Actual) -> dict[str, Any]:
    """Without words: how a difference is told is no matter."""
    ingress = actual.ingress
    return {name: getattr(actual, name) for name in MODELLED} | {
        "links": {
            name: tuple(getattr(link, part) for part in OF_A_LINK) for name, link in actual.links.items()
        },
        "attached": ingress.attached,
        "differs": bool(ingress.differences),
        "clsact": ingress.clsact,
    }


def differences(real: dict[str, Any], fake: dict[str, Any]) -> list[str]:
    """For a failure's message: what only one of them has."""
    found = []
    for part, theirs in real.items():
        ours = fake[part]
        if ours != theirs and isinstance(ours, dict):
            names = [key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key)]
            found += [f"{key}: kernel {theirs.get(key)}, fake {ours.get(key)}" for key in names]
        elif ours != theirs:
            found.append(f"{part}: kernel {theirs}, fake {ours}")
    return found


def answer(error: DatapathError | None) -> str:
    """What an operation ended with. libnftables says the number in words only."""
    if error is None:
        return "done"
    if not isinstance(error, KernelError):
        return type(error).__name__
    flags = re.MULTILINE | re.IGNORECASE
    ends = r"(?:$|; did you mean)"
    words = [n for text, n in _ERRNO_OF.items() if re.search(re.escape(text) + ends, error.reason, flags)]
    code = error.errno or (words[0] if words else 0)
    return errno.errorcode.get(code, error.reason)


def carry_out(steps: tuple[Step, ...]) -> str:
    try:
        with Executor() as executor:
            executor.run_batch(steps)
    except DatapathError as error:
        return answer(error)
    return "done"


class Both:
    """A node and its fake, and what an apply remembers of both."""

    def __init__(self, real: Node) -> None:
        self.real = real
        self.record = Record()
        self.plan = Plan(0)
        self.log: list[str] = []
        start = observe(self.plan, watching(self.record))
        self.fake = FakeKernel(start.links.values(), start.sysctls, start.foreign_rules, start.ingress.hook)

    def compare(self, what: str) -> Actual:
        """Both observed; equal."""
        state = watching(self.record)
        real, fake = observe(self.plan, state), self.fake.observe(self.plan, state)
        self.log.append(what)
        wrong = differences(comparable(real), comparable(fake))
        assert not wrong, "\n".join([*self.log[-12:], *wrong])
        return real

    def run(self, *steps: Step) -> str:
        """One step, or one batch, on both."""
        real = carry_out(steps)
        with pytest.MonkeyPatch.context() as patch:
            self.fake.serve(patch)
            fake = carry_out(steps)
        said = [f"{step.describe()}: {real}" for step in steps]
        assert fake == real, "\n".join([*self.log[-12:], *said, f"but the fake: {fake}"])
        self.compare("\n".join(said))
        return real

    def steps_towards(self, name: str, backend: str) -> tuple[Step, ...]:
        """What an apply would do now; its record is kept as an apply keeps it."""
        state = watching(self.record)
        facts = self.fake.facts(state)
        self.plan = (
            Plan(facts.fwmark_mask) if name == "none" else compile_policy(policy(name, backend).policy, facts)
        )
        actual = self.compare(f"towards {name} by {backend}")
        changes = reconcile(actual, self.plan, self.record)
        self.record = changes.before
        return changes.steps

    def somebody(self, verb: str, name: str) -> None:
        """Somebody else does something to a device; the pair of eth1 and eth2 comes and goes as one."""
        present = name in self.fake.links.by_name
        if verb == "make" and not present:
            self.real.run("ip", "link", "add", *_PAIR[:1], "type", "veth", "peer", "name", *_PAIR[1:])
            for device in _PAIR:
                self.fake.device_made(ActualLink(device, up=False, kind="veth"))
        elif verb == "delete" and present:
            self.real.run("ip", "link", "delete", name)
            for device in _PAIR if name in _PAIR else (name,):
                self.fake.device_deleted(device)
        elif verb in ("up", "down") and present and not self.fake.links.by_name[name].parent:
            self.real.run("ip", "link", "set", name, verb)
            (self.fake.links.set_up if verb == "up" else self.fake.device_down)(name)
        self.compare(f"somebody: {verb} {name}")


@pytest.fixture
def both() -> Iterator[Both]:
    with node(4) as real, inside(real.namespace.name):
        yield Both(real)


def names(*without: str) -> list[str]:
    """Policies that this kernel can carry."""
    able = kernel_has("8021q")
    return [
        name
        for name in POLICIES
        if name not in without
        and (able or "vlan" not in name)
        and not any(word in name for word in ("vrf", "accelerate"))
    ]


def parameters(*without: str) -> list[ParameterSet]:
    """The same as parameters of a test, so that what is missing is skipped aloud."""
    in_machine = [pytest.mark.vm, pytest.mark.one_kernel("6.1")]
    vlan = [pytest.mark.kernel_feature("8021q"), *in_machine]
    # What the fake knows of VRFs is compared with no kernel: tests/vm/test_vrf_vm.py sees what the product does there.
    chosen = [name for name in POLICIES if name not in without and "vrf" not in name]
    flowtable = [pytest.mark.kernel_feature("nf_flow_table"), *in_machine]
    return [
        pytest.param(
            name, marks=(vlan if "vlan" in name else []) + (flowtable if "accelerate" in name else [])
        )
        for name in chosen
    ]


def test_facts_are_those_of_the_node(both: Both) -> None:
    for name in ("two", "mask", "gateway"):
        for step in both.steps_towards(name, "nft"):
            assert both.run(step) == "done"
        real, fake = observe_facts(watching(both.record)), both.fake.facts(watching(both.record))
        for part in OF_FACTS:
            assert getattr(fake, part) == getattr(real, part), part


@pytest.mark.parametrize("name", parameters("two", "none"))
def test_valid_changes(both: Both, name: str) -> None:
    """There and back again and away: every step is done, on both alike.

    Left out on 6.12: there is one fake for all kernels, so the oldest says most.
    """
    for target in ("two", name, "two", "none"):
        for step in both.steps_towards(target, "nft"):
            assert both.run(step) == "done", both.log
    assert both.fake.nft.table is None
    assert not both.fake.rules.ordered


def wild_steps(
    both: Both, chance: random.Random, backend: str, seen: list[Step]
) -> Iterable[tuple[Step, ...]]:
    """Steps that an apply could make, cut short, out of order, twice, or from another time; alone or in batches."""
    steps = list(both.steps_towards(chance.choice(names()), backend))
    seen += steps
    manner = chance.choice(["whole", "cut", "shuffled", "twice", "old"])
    if manner == "cut":
        steps = steps[: chance.randint(0, len(steps))]
    elif manner == "shuffled":
        chance.shuffle(steps)
    elif manner == "twice":
        steps = [step for step in steps for _ in range(chance.choice([1, 2]))]
    elif manner == "old" and seen:
        steps = chance.choices(seen, k=6)
    return batches(steps) if chance.random() < 0.4 else ((step,) for step in steps)


@pytest.mark.parametrize("seed", range(8))
def test_wild_sequences(both: Both, seed: int) -> None:
    chance = random.Random(f"wild {seed}")
    seen: list[Step] = []
    answers: dict[str, int] = {}
    for _ in range(10):
        for steps in wild_steps(both, chance, "nft", seen):
            said = both.run(*steps)
            answers[said] = answers.get(said, 0) + 1
        for verb, name in EVENTS if chance.random() < 0.5 else ():
            if chance.random() < 0.4:
                both.somebody(verb, name)
    assert answers["done"] > 30


@pytest.mark.bpf
@pytest.mark.parametrize("seed", range(2))
def test_wild_sequences_with_ebpf(both: Both, seed: int) -> None:
    """Only the steps of the program: the rest is above, and a new program takes a third of a second."""
    chance = random.Random(seed)
    programs: list[Step] = []
    others: list[Step] = []
    for name in chance.sample(names("table", "priority", "track"), 8):
        for step in both.steps_towards(name, "ebpf"):
            (programs if isinstance(step, SyncIngress) else others).append(step)
            both.run(step)
        if chance.random() < 0.5:
            both.run(chance.choice(programs))
        if chance.random() < 0.3:
            both.somebody("delete", "eth1")
            both.run(chance.choice(programs))
            both.somebody("make", "eth1")
    assert programs
    assert any(isinstance(step, NftTransaction) for step in others)
