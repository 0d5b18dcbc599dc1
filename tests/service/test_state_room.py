# SPDX-License-Identifier: Apache-2.0
"""A state directory that is full or read-only: what is in force stays and is healed, and the error says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datapath.kernel.bpf import attachments
from datapath.plan.tc import Hook
from tests.service.daemon import FIRST, SECOND, Daemon, policy, wait_until
from tests.service.mounts import MountedNode

pytestmark = pytest.mark.root

#: What each verb does while the policy of two networks is in force, one is to be put in force, and nothing can be
#: written: its exit status.
FULL = {"apply": 1, "rollback": 1, "restore": 0, "history": 0, "status": 0, "facts": 0, "confirm": 1}
READ_ONLY = {**FULL, "teardown": 1}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[MountedNode]:
    made = MountedNode(tmp_path)
    made.policy.write_text(policy(FIRST))
    yield made
    made.close()


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedNode]:
    """Generation 2, two networks; the policy file has another."""
    made = MountedNode(tmp_path_factory.mktemp("node"))
    for networks in ((FIRST,), (FIRST, SECOND)):
        made.policy.write_text(policy(*networks))
        _ok(made, "apply", str(made.policy))
    made.policy.write_text(policy(SECOND))
    yield made
    made.close()


def _ok(node: MountedNode, verb: str, *arguments: str) -> str:
    done = node.datapath(verb, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _in_force(node: MountedNode) -> list[str]:
    """Networks in force; there is no drift, and nothing waits for a confirmation."""
    status: dict[str, Any] = json.loads(_ok(node, "status", "--json"))
    assert status["drift"] == []
    assert not [note for note in status["notes"] if "confirm" in note]
    return [network["name"] for network in status["networks"]]


def _refused(node: MountedNode, verb: str, status: int, reason: str) -> None:
    """The verb, and, where it fails, an error that names file and remedy; the kernel is as it was."""
    before, files = node.snapshot(), _files(node)
    arguments = [str(node.policy)] if verb == "apply" else []
    done = node.datapath(verb, *arguments)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    if status and verb != "confirm":
        assert str(node.state) in done.stderr
        assert reason in done.stderr
        assert "hint: " in done.stderr
    assert node.snapshot() == before
    assert _files(node) == files


def _sorted(node: MountedNode) -> dict[str, list[str]]:
    """Where the last write failed, everything was changed and put back: nft then lists it in another order."""
    return {name: sorted(text.splitlines()) for name, text in node.snapshot().items()}


def _files(node: MountedNode) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(node.seen.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("verb", FULL)
def test_every_verb_with_a_full_directory(applied: MountedNode, verb: str) -> None:
    applied.fill()
    try:
        _refused(applied, verb, FULL[verb], "No space left")
    finally:
        applied.make_room()
    assert _in_force(applied) == ["first", "second"]


@pytest.mark.parametrize("verb", READ_ONLY)
def test_every_verb_with_a_read_only_directory(applied: MountedNode, verb: str) -> None:
    applied.read_only()
    try:
        _refused(applied, verb, READ_ONLY[verb], "cannot be written")
    finally:
        applied.writable()
    assert _in_force(applied) == ["first", "second"]


def test_nothing_on_probation_is_left_by_an_apply_that_found_no_room(applied: MountedNode) -> None:
    applied.fill()
    done = applied.datapath("apply", str(applied.policy), "--confirm", "600")
    applied.make_room()
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert _in_force(applied) == ["first", "second"]


def test_whatever_room_there_is(applied: MountedNode) -> None:
    """Too little for the first file, for the second, for the third: all of it, or nothing."""
    before = _sorted(applied)
    refusals = 0
    for pages in range(32):
        applied.fill(free_pages=pages)
        done = applied.datapath("apply", str(applied.policy))
        applied.make_room()
        if done.returncode == 0:
            break
        refusals += 1
        assert "No space left" in done.stderr, done.stderr
        assert _sorted(applied) == before, pages
        assert not list(applied.seen.rglob("*.new")), pages
        assert _in_force(applied) == ["first", "second"], pages
    assert refusals > 2
    assert _in_force(applied) == ["second"]
    _ok(applied, "rollback")
    assert _in_force(applied) == ["first", "second"]


def test_first_apply_with_a_full_directory(node: MountedNode) -> None:
    before = node.snapshot()
    node.fill()
    done = node.datapath("apply", str(node.policy))
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert node.snapshot() == before
    node.make_room()
    _ok(node, "apply", str(node.policy))


def test_teardown_with_a_full_directory(node: MountedNode) -> None:
    """It needs no room, and makes some."""
    before = node.snapshot()
    _ok(node, "apply", str(node.policy))
    node.fill()
    _ok(node, "teardown")
    assert node.snapshot() == before
    assert {path.name for path in node.seen.iterdir()} <= {"lock", "daemon.lock"}


DRIFTS: dict[str, Callable[[MountedNode], object]] = {
    "ruleset flushed": lambda node: node.ns.nft("flush ruleset"),
    "ip rule deleted": lambda node: node.delete_rule(4),
    "qdisc removed": lambda node: node.ns.run("tc", "qdisc", "del", "dev", "eth0", "clsact"),
    "rp_filter on": lambda node: node.ns.sysctl({"net/ipv4/conf/eth0/rp_filter": 1}),
    "device gone and back": lambda node: node.replug_device("eth0"),
}


@pytest.fixture(scope="module", params=["full", "read-only"])
def hindered(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[MountedNode, Daemon]]:
    """A daemon whose state directory takes nothing any more."""
    made = MountedNode(tmp_path_factory.mktemp("node"))
    made.policy.write_text(policy(FIRST, SECOND, backend="ebpf"))
    # With clsact there is a qdisc to lose, too.
    with Daemon(made, environment={attachments.ENVIRONMENT: str(Hook.CLSACT)}) as daemon:
        daemon.started()
        if request.param == "full":
            made.fill()
        else:
            made.read_only()
        yield made, daemon
    made.close()


@pytest.mark.bpf
@pytest.mark.parametrize("name", DRIFTS)
def test_healing_needs_no_room(hindered: tuple[MountedNode, Daemon], name: str) -> None:
    node, daemon = hindered
    before = node.snapshot()
    DRIFTS[name](node)
    wait_until(lambda: node.has(before), f"{name}: healed\n{daemon.log_path.read_text()}")


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_daemon_waits_for_room_with_a_new_policy(node: MountedNode, when: str) -> None:
    _ok(node, "apply", str(node.policy))
    before = node.snapshot()
    if when == "before":
        node.fill()
        node.policy.write_text(policy(FIRST, SECOND))
    with Daemon(node) as daemon:
        daemon.started()
        if when != "before":
            node.fill()
            node.policy.write_text(policy(FIRST, SECOND))
        assert "No space left" in daemon.wait_for("policy_not_applied")["error"]
        assert node.snapshot() == before
        node.ns.nft("flush ruleset")
        daemon.wait_for("drift_healed")
        wait_until(lambda: node.has(before), "the policy in force is healed meanwhile")
        node.make_room()
        daemon.wait_for("policy_in_force", 1 if when == "before" else 2)
        assert _in_force(node) == ["first", "second"]


def test_record_that_cannot_be_written_is_kept_until_it_can(node: MountedNode) -> None:
    """Somebody turns rp_filter on for all: now every device has a value to be put back."""
    _ok(node, "apply", str(node.policy))
    with Daemon(node) as daemon:
        daemon.started()
        node.fill()
        node.ns.sysctl({"net/ipv4/conf/all/rp_filter": 1})
        daemon.wait_for("state_not_written")

        def values() -> list[str]:
            return [
                node.ns.read_sysctl(f"net/ipv4/conf/{name}/rp_filter") for name in ("all", "eth0", "eth1")
            ]

        wait_until(lambda: values() == ["0", "0", "1"], "healed although it cannot be written down")
        record = (node.seen / "state.json").read_bytes()
        node.make_room()
        node.ns.nft("flush ruleset")
        wait_until(lambda: (node.seen / "state.json").read_bytes() != record, "written at the next look")
    _ok(node, "teardown")
    assert node.ns.read_sysctl("net/ipv4/conf/all/rp_filter") == "1"
