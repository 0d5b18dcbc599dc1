# SPDX-License-Identifier: Apache-2.0
"""A node with the ip rules of an earlier version: the first apply of this one, under look-ups of every mark."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.plan.model import Plan
from datapath.plan.rtnl import ROUTE_PROTOCOL
from datapath.policy import Policy
from tests.netns.nodes import Node, node
from tests.unit.compiler.old_rules import as_before

pytestmark = [pytest.mark.root, pytest.mark.bpf]

BASE = 10000
NETWORKS = 20
POLICY = yaml.safe_dump(
    {
        "version": 1,
        "networks": [
            {
                "name": f"n{number}",
                "interface": f"eth{number}",
                "vips": [f"198.51.{number}.0/24", f"2001:db8:{number:x}::/64"],
                "gateway": [f"198.51.{number}.1", f"2001:db8:{number:x}::1"],
            }
            for number in range(1, NETWORKS + 1)
        ],
    }
)


@pytest.fixture
def made() -> Iterator[Node]:
    with node(NETWORKS) as built:
        yield built


def apply(where: Node, folder: Path) -> str:
    path = folder / "policy.yaml"
    path.write_text(POLICY, encoding="utf-8")
    done = where.datapath(folder / "state", "apply", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def go_back(where: Node, plan: Plan, bank: int) -> None:
    """The rules and the header of our table as an earlier version left them."""
    for family in ("-4", "-6"):
        where.run("ip", family, "rule", "flush", "protocol", str(ROUTE_PROTOCOL))
    for rule in as_before(plan, BASE, bank).rules:
        family, _, words = rule.render().partition(" ")
        where.namespace.ip([f"{family} rule add {words}"])
    header = f'continue comment "fwmark_mask={plan.fwmark_mask:#010x} rule_bank={bank} #00000000"'
    where.run("nft", f"flush chain inet datapath ids; add rule inet datapath ids {header}")


@dataclass
class Watch:
    """Asks for the route of every mark, over and over, in both families."""

    where: Node
    batch: Path
    expected: list[str]
    rounds: int = 0
    wrong: list[str] = field(default_factory=list)

    def look(self) -> None:
        argv = self.where.namespace.argv("ip", "-force", "-batch", str(self.batch))
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        found = [line for line in done.stdout.splitlines() if " dev " in line]
        self.wrong += [
            f"{want!r} is not in {line!r}"
            for want, line in zip(self.expected, found, strict=False)
            if want not in line
        ]
        if len(found) != len(self.expected):
            self.wrong.append(f"{len(found)} answers: {done.stderr}")
        self.rounds += 1

    def until(self, stopped: threading.Event) -> None:
        while not stopped.is_set():
            self.look()


@pytest.fixture
def watch(made: Node, tmp_path: Path) -> Watch:
    batch = tmp_path / "lookups"
    ids = compile_policy(Policy.model_validate(yaml.safe_load(POLICY)), Facts()).ids
    batch.write_text(
        "".join(
            f"route get {address} mark {network.fwmark:#x}\n"
            for network in ids
            for address in ("203.0.113.9", "2001:db8:ffff::9")
        )
    )
    return Watch(made, batch, [f"dev eth{n.name[1:]} table {n.table} " for n in ids for _ in (4, 6)])


@pytest.mark.parametrize("bank", [0, 1])
def test_no_mark_finds_another_table_while_the_tree_is_replaced(
    made: Node, watch: Watch, tmp_path: Path, bank: int
) -> None:
    plan = compile_policy(Policy.model_validate(yaml.safe_load(POLICY)), Facts())
    apply(made, tmp_path)
    go_back(made, plan, bank)
    assert "goto 100" in made.run("ip", "rule")
    watch.look()
    assert watch.wrong == []
    stopped = threading.Event()
    watcher = threading.Thread(target=watch.until, args=(stopped,))
    watcher.start()
    try:
        told = apply(made, tmp_path)
    finally:
        stopped.set()
        watcher.join()
    assert "add rule" in told
    assert "delete rule" in told
    assert watch.rounds > 1
    assert watch.wrong == []
    for family in ("-4", "-6"):
        shown = made.run("ip", family, "rule").splitlines()
        ours = [line for line in shown if f"proto {ROUTE_PROTOCOL}" in line]
        last = BASE + (2295 if bank else 4095)
        assert ours[-1].startswith(f"{last}:")
        assert len(ours) == len(plan.rules) // 2
    assert "nothing to do" in apply(made, tmp_path)


def test_the_watch_sees_a_leaf_that_is_missing(made: Node, watch: Watch, tmp_path: Path) -> None:
    apply(made, tmp_path)
    made.run("ip", "rule", "del", "fwmark", "0x00070000/0x0fff0000")
    watch.look()
    assert watch.wrong
