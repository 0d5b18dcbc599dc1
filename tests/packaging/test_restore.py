# SPDX-License-Identifier: Apache-2.0
"""`datapath restore`: what a reboot takes away is put back, from the state directory alone.

A reboot is a new namespace, and a state directory that says another boot.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.daemon import DEVICES, FIRST, SECOND, Daemon, Node, policy, wait_until

pytestmark = [pytest.mark.root]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    made.close()


def _reboot(node: Node, *, devices: tuple[str, ...] = DEVICES) -> None:
    """All of the kernel's state goes; the state directory stays."""
    node.close()
    node.ns.create()
    for device in devices:
        node.add_device(device)
    path = node.state / "state.json"
    document = json.loads(path.read_text())
    del document["sha256"]
    path.write_text(json.dumps(document | {"boot": str(uuid.uuid4())}))


def _run(node: Node, verb: str, *arguments: str) -> str:
    done = node.datapath(verb, *arguments)
    assert done.returncode == 0, f"{done.args}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def _apply(node: Node, text: str, *arguments: str) -> None:
    node.policy.write_text(text)
    _run(node, "apply", str(node.policy), *arguments)


def _ids(node: Node) -> list[dict[str, object]]:
    ids: list[dict[str, object]] = json.loads(_run(node, "facts", "--json"))["ids"]
    return sorted(ids, key=str)


def test_everything_is_as_before_the_reboot(node: Node) -> None:
    """Also the ids: `second` alone would have got the first ones."""
    _apply(node, policy(FIRST, SECOND))
    _apply(node, policy(SECOND))
    before, ids = node.snapshot(), _ids(node)
    _reboot(node)
    assert not node.has(before)
    # The files have gone bad meanwhile.
    node.policy.write_text("version: 1\nnetworks: [")
    assert "verified" in _run(node, "restore")
    assert node.has(before)
    assert _ids(node) == ids
    assert "no drift" in _run(node, "status")
    # History goes on where it was.
    numbers = [item["number"] for item in json.loads(_run(node, "history", "--json"))]
    assert numbers == [1, 2, 3]


EGRESS = """egress:
  - {name: jobs, network: first, set: true, source_ip: ["203.0.113.10", "2001:db8:113::10"]}
"""


def test_members_of_egress_sets_are_there_before_the_network_is(node: Node) -> None:
    """From the first packet on: pods start before the program that names them does."""
    members = "10.112.1.3\n10.112.7.0/24\nfd00:10:112:1::3\n"
    _apply(node, policy(FIRST) + EGRESS)
    _run(node, "egress", "set", "jobs", *members.split())
    before = node.snapshot()
    assert "10.112.7.0/24" in before["table"]
    _reboot(node, devices=())
    _run(node, "restore")
    for device in DEVICES:
        node.add_device(device)
    assert _run(node, "egress", "get", "jobs") == members
    table = node.snapshot()["table"]
    assert "10.112.7.0/24" in table
    assert "fd00:10:112:1::3" in table
    # The daemon, when it starts, and a program that adds one more, both go on from there.
    with Daemon(node).started():
        wait_until(lambda: node.has(before), "all is as it was")
        assert _run(node, "egress", "add", "jobs", "10.112.1.4") == "jobs: 4 member(s)\n"
    with Daemon(node).started():
        assert "10.112.1.4" in node.snapshot()["table"]
    assert _run(node, "egress", "get", "jobs").split() == sorted([*members.split(), "10.112.1.4"])
    assert "no drift" in _run(node, "status")


def test_a_set_that_was_emptied_is_empty_after_the_reboot(node: Node) -> None:
    _apply(node, policy(FIRST) + EGRESS)
    _run(node, "egress", "set", "jobs", "10.112.1.3")
    _run(node, "egress", "set", "jobs")
    _reboot(node)
    _run(node, "restore")
    assert _run(node, "egress", "get", "jobs") == ""
    assert "10.112.1.3" not in node.snapshot()["table"]


def test_a_change_on_probation_is_not_restored(node: Node) -> None:
    _apply(node, policy(FIRST))
    before = node.snapshot()
    _apply(node, policy(FIRST, SECOND), "--confirm", "600")
    _reboot(node)
    _run(node, "restore")
    assert node.has(before)


def test_a_first_change_on_probation_leaves_nothing(node: Node) -> None:
    _apply(node, policy(FIRST), "--confirm", "600")
    _reboot(node)
    empty = node.snapshot()
    assert "nothing to restore" in _run(node, "restore")
    assert node.has(empty)


def test_devices_that_come_later_hold_nothing_up(node: Node) -> None:
    """The boot unit runs before any device is configured."""
    _apply(node, policy(FIRST, SECOND))
    before = node.snapshot()
    _reboot(node, devices=DEVICES[:1])
    _run(node, "restore")
    assert "dev eth0" in node.ns.run("ip", "route", "show", "table", "all", "proto", "78")
    assert node.ns.run("nft", "list", "tables") != ""
    assert "lookup 7000" in node.ns.run("ip", "rule", "show")
    node.add_device(DEVICES[1])
    _run(node, "apply", str(node.policy))
    assert node.has(before)


def test_what_is_in_force_is_left_alone(node: Node) -> None:
    _apply(node, policy(FIRST))
    before = node.snapshot()
    assert "nothing to restore" in _run(node, "restore")
    assert node.has(before)


def test_nothing_after_a_teardown(node: Node) -> None:
    _apply(node, policy(FIRST))
    _run(node, "teardown")
    assert "nothing to restore" in _run(node, "restore")
    assert json.loads(_run(node, "restore", "--json")) == {"changed": False}


def test_the_last_policy_is_unreadable(node: Node) -> None:
    """A clear error, and nothing half done."""
    _apply(node, policy(FIRST))
    _reboot(node)
    (node.state / "history/000001.json").write_text("{")
    done = node.datapath("restore")
    assert done.returncode == 2
    assert "damaged" in done.stderr
