# SPDX-License-Identifier: Apache-2.0
"""A change on probation goes back whoever is killed, and does not come back by itself."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datapath.state import LOCK_WAIT_S, StateDirectory
from tests.netns.router import Router, tcp_server
from tests.service.daemon import DEVICES, FIRST, SECOND, Daemon, Node, policy, wait_until

pytestmark = pytest.mark.root

TARGET = "192.0.2.50"


def _state(node: Node) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((node.state / "state.json").read_text())
    return document


def _rewrite(node: Node, **values: Any) -> None:
    """As if time had passed: the files that somebody finds later."""
    document = _state(node)
    document.pop("sha256", None)
    (node.state / "state.json").write_text(json.dumps({**document, **values}))


def _apply(node: Node, text: str, *arguments: str, name: str = "by-hand.yaml") -> None:
    # Below a folder that no daemon watches.
    path = node.folder / "elsewhere" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    done = node.datapath("apply", str(path), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def _guardian(node: Node) -> int:
    """The process that holds the clock of the pending change."""
    token = _state(node)["pending"]["token"].encode()
    (pid,) = (
        int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if token in path.read_bytes()
    )
    return pid


def _kill_guardian(node: Node) -> None:
    pid = wait_until(lambda: _guardian(node), "the guardian is there")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not _is_running(pid), "the guardian is dead")


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _overdue(node: Node) -> None:
    _rewrite(node, pending={**_state(node)["pending"], "deadline_s": 1.0})


def _apply_unguarded(node: Node) -> dict[str, str]:
    """A second network on probation for ten seconds whose guardian is dead; what was before."""
    before = node.snapshot()
    _apply(node, policy(FIRST, SECOND), "--confirm", "10")
    _kill_guardian(node)
    return before


def test_the_guardian_outlives_who_applied(node: Node) -> None:
    _apply(node, policy(FIRST))
    before = node.snapshot()
    _apply(node, policy(FIRST, SECOND), "--confirm", "1")
    wait_until(lambda: node.has(before), "gone back")
    wait_until(lambda: _state(node)["pending"] is None, "written down")
    late = node.datapath("confirm")
    assert late.returncode == 1
    assert (
        "nothing waits for confirmation; the last change was undone: nobody confirmed it in time"
        in late.stderr
    )


@pytest.mark.slow
def test_the_guardian_tries_again_when_somebody_works_on_it(node: Node) -> None:
    _apply(node, policy(FIRST))
    before = node.snapshot()
    _apply(node, policy(FIRST, SECOND), "--confirm", "4")
    with StateDirectory(node.state).locked():
        deadline = time.monotonic() + LOCK_WAIT_S + 6
        wait_until(lambda: time.monotonic() > deadline, "its first attempt has failed")
        assert not node.has(before)
    wait_until(lambda: node.has(before), "gone back")


def test_the_daemon_takes_over_from_a_guardian_that_was_killed(node: Node) -> None:
    node.policy.write_text(policy(FIRST))
    with Daemon(node) as daemon:
        daemon.started()
        before = _apply_unguarded(node)
        assert "name: second" in _state(node)["policy"]
        assert daemon.wait_for("change_undone")["reason"] == "nobody confirmed it in time"
        wait_until(lambda: node.has(before), "gone back")
        wait_until(lambda: _state(node)["pending"] is None, "written down")
    assert json.loads(node.datapath("status", "--json").stdout)["drift"] == []


def test_a_daemon_that_was_restarted_takes_over(node: Node) -> None:
    node.policy.write_text(policy(FIRST))
    with Daemon(node) as daemon:
        daemon.started()
        before = _apply_unguarded(node)
        daemon.stop(signal.SIGKILL)
    with Daemon(node) as again:
        again.started()
        again.wait_for("change_undone")
        wait_until(lambda: node.has(before), "gone back")


def test_confirmed_in_time_stays_although_the_guardian_is_dead(node: Node) -> None:
    node.policy.write_text(policy(FIRST))
    with Daemon(node) as daemon:
        daemon.started()
        _apply(node, policy(FIRST, SECOND), "--confirm", "600")
        kept = node.snapshot()
        _kill_guardian(node)
        assert node.datapath("confirm").returncode == 0
        daemon.stop()
    with Daemon(node) as again:
        again.started()
        assert node.has(kept)
        assert not again.events("change_undone")


def test_deadline_that_passed_while_nobody_was_there(node: Node) -> None:
    """Neither a late `confirm` keeps it, nor the next daemon, although its files say so."""
    _apply(node, policy(FIRST))
    before = node.snapshot()
    node.policy.write_text(policy(FIRST, SECOND))
    assert node.datapath("apply", str(node.policy), "--confirm", "600").returncode == 0
    unconfirmed = node.snapshot()
    _kill_guardian(node)
    _overdue(node)
    late = node.datapath("confirm")
    assert late.returncode == 1
    assert "too late, the change goes back: nobody confirmed it in time" in late.stderr
    with Daemon(node) as daemon:
        daemon.started()
        assert "nobody confirmed" in daemon.wait_for("policy_was_undone")["reason"]
        assert node.has(before)
        daemon.stop()
    with Daemon(node) as again:
        again.started()
        assert node.has(before), "also over another restart"
        again.process.send_signal(signal.SIGHUP)
        again.wait_for("policy_in_force")
        assert node.has(unconfirmed), "a person says so"
        again.stop()
    with Daemon(node) as last:
        last.started()
        assert node.has(unconfirmed), "and that is what counts from then on"


def test_restore_undoes_what_is_overdue(node: Node) -> None:
    _apply(node, policy(FIRST))
    before = node.snapshot()
    _apply(node, policy(FIRST, SECOND), "--confirm", "600")
    _kill_guardian(node)
    assert "nothing to restore" in node.datapath("restore").stdout, "it is on probation still"
    _overdue(node)
    assert "verified" in node.datapath("restore").stdout
    assert node.has(before)
    assert _state(node)["pending"] is None


@pytest.mark.parametrize("is_first", [False, True], ids=["second", "first"])
def test_a_reboot_is_no_confirmation(node: Node, *, is_first: bool) -> None:
    """The daemon comes up alone, without the restore unit; its files hold what nobody confirmed."""
    if not is_first:
        _apply(node, policy(FIRST))
    before = node.snapshot()
    node.policy.write_text(policy(FIRST, SECOND))
    assert node.datapath("apply", str(node.policy), "--confirm", "600").returncode == 0
    _kill_guardian(node)
    node.close()
    node.ns.create()
    for device in DEVICES:
        node.add_device(device)
    _rewrite(node, boot=str(uuid.uuid4()))
    with Daemon(node) as daemon:
        daemon.started()
        assert "the machine went down" in daemon.wait_for("policy_was_undone")["reason"]
        assert node.has(before)


def test_killed_before_the_first_step_leaves_nothing_pending(node: Node) -> None:
    """The change never came in force: there is nothing to do, and that is written down."""
    _apply(node, policy(FIRST))
    before = node.snapshot()
    _rewrite(node, pending={"token": "00", "previous": 1, "deadline_s": 1.0})
    node.policy.write_text(policy(FIRST))
    with Daemon(node) as daemon:
        daemon.started()
        wait_until(lambda: _state(node)["pending"] is None, "written down")
        assert node.has(before)
        assert not daemon.events("policy_was_undone")


@pytest.fixture
def router(node: Node) -> Iterator[Router]:
    made = Router(node.ns, "eth5", "192.0.2.1/24", f"{TARGET}/24")
    node.ns.ip(["addr add 192.0.2.2/24 dev eth5"])
    yield made
    made.close()


PROBE = f"probes:\n  - {{tcp: {TARGET}:443, timeout: 1, attempts: 2}}\n"


def test_probe_that_fails_on_probation_undoes_the_change_at_once(node: Node, router: Router) -> None:
    _apply(node, policy(FIRST))
    before = node.snapshot()
    with tcp_server(router.namespace, TARGET, 443) as clients:
        _apply(node, policy(FIRST, SECOND) + PROBE, "--confirm", "600")
        wait_until(lambda: len(clients) >= 4, "repeated, besides once before and once after")
        assert not node.has(before)
    wait_until(lambda: node.has(before), "gone back long before its time")
    wait_until(lambda: _state(node)["pending"] is None, "written down")
    late = node.datapath("confirm")
    assert f"undone: probe tcp {TARGET}:443 fails: connection refused (2 attempts)" in late.stderr


@pytest.mark.usefixtures("router")
def test_probe_that_never_worked_does_not_undo_a_change_on_probation(node: Node) -> None:
    _apply(node, policy(FIRST))
    _apply(node, policy(FIRST, SECOND) + PROBE, "--confirm", "600")
    assert _state(node)["pending"]["watched"] == []
    kept = node.snapshot()
    assert node.datapath("confirm").returncode == 0
    assert node.has(kept)


def test_reload_with_a_failing_probe_keeps_the_old_policy(node: Node, router: Router) -> None:
    node.policy.write_text(policy(FIRST))
    with Daemon(node) as daemon, tcp_server(router.namespace, TARGET, 443):
        daemon.started()
        before = node.snapshot()
        # Its answers are refused by the network whose device they come in by.
        other = (
            "  - name: other\n    interface: eth5\n    vips: [192.0.2.64/26]\n"
            f"    reverse_path: {{deny: [{TARGET}/32]}}\n"
        )
        node.policy.write_text(policy(FIRST, other) + PROBE)
        error = daemon.wait_for("policy_undone")["error"]
        assert f"probe tcp {TARGET}:443 fails after the change: no answer within 1 s (2 attempts)" in error
        assert node.has(before)
        node.ns.nft("flush ruleset")
        daemon.wait_for("drift_healed")
        wait_until(lambda: node.has(before), "the old one is what is healed")
        node.policy.write_text(policy(FIRST, SECOND) + PROBE)
        daemon.wait_for("policy_in_force", 2)
        assert len(daemon.events("policy_undone")) == 1, "not tried again and again"


@pytest.mark.usefixtures("router")
def test_first_policy_of_a_daemon_stays_although_a_probe_fails(node: Node) -> None:
    """There is nothing to go back to, and everybody else wants to be served."""
    node.policy.write_text(policy(FIRST) + "probes:\n  - {gateway: first, timeout: 1, attempts: 1}\n")
    with Daemon(node) as daemon:
        daemon.started()
        assert "gateway 203.0.113.1 of first fails" in daemon.wait_for("probe_failed")["error"]
        assert "datapath" in node.snapshot()["table"]
