# SPDX-License-Identifier: Apache-2.0
"""Policy files that are being written while the daemon reads: half a policy is never put in force."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from datapath.kernel.lease import is_being_written
from tests.service.daemon import FIRST, SECOND, Daemon, Node, network, policy

pytestmark = pytest.mark.root

_THIRD = network("third", "p-eth0", 115)


def _applied(daemon: Daemon) -> int:
    return len(daemon.events("policy_in_force"))


def test_a_writer_is_seen_and_a_reader_is_none(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    assert not is_being_written(path)
    path.write_text("x")
    assert not is_being_written(path)
    for mode in ("r", "w", "a", "r+"):
        with path.open(mode):
            assert is_being_written(path) == (mode != "r")
        assert not is_being_written(path)


def test_a_writer_that_comes_while_we_ask_ends_nobody(tmp_path: Path) -> None:
    """The kernel tells the holder of a lease by a signal, which is deadly unless it is chosen well."""
    path = tmp_path / "policy.yaml"
    path.write_text("x")
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            os.close(os.open(path, os.O_WRONLY))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        answers = {is_being_written(path) for _ in range(20_000)}
    finally:
        stop.set()
        writer.join()
    assert answers == {True, False}


@pytest.mark.parametrize("half", ["a policy by itself", "no policy"])
def test_half_of_a_file_that_is_written_in_place_is_not_applied(node: Node, half: str) -> None:
    """An editor that truncates and writes, slowly, while other files in the directory change."""
    whole = policy(FIRST, SECOND, _THIRD)
    cut = (
        whole.index("  - name: second")
        if half == "a policy by itself"
        else whole.index("  - name: second") + 9
    )
    with Daemon(node) as daemon:
        daemon.started()
        before = node.snapshot()
        with node.policy.open("w") as file:
            file.write(whole[:cut])
            file.flush()
            (node.folder / ".policy.yaml.swp").write_text("wakes the daemon")
            daemon.wait_for("policy_being_written")
            assert node.snapshot() == before
            file.write(whole[cut:])
        assert daemon.wait_for("policy_in_force", 2)["steps"] > 0
        assert not daemon.events("policy_rejected")
        assert _applied(daemon) == 2
    assert "115" in node.snapshot()["table"]


def test_daemon_that_starts_while_the_file_is_written_waits(node: Node) -> None:
    with node.policy.open("w") as file:
        file.write(policy(FIRST))
        file.flush()
        with Daemon(node) as daemon:
            daemon.started()
            daemon.wait_for("policy_being_written")
            assert not _applied(daemon)
            file.write(SECOND)
            file.close()
            daemon.wait_for("policy_in_force")
            assert "114" in node.snapshot()["table"]


def test_truncated_file_is_refused_and_named(node: Node) -> None:
    """Cut anywhere: what is in force stays, unless what is left is a policy by itself."""
    whole = policy(FIRST, SECOND).encode()
    with Daemon(node) as daemon:
        daemon.started()
        before = node.snapshot()
        rejected = 0
        for cut in (0, 5, len(whole) // 2, len(whole) - 20):
            node.policy.write_bytes(whole[:cut] + b"\n  - [")
            rejected += 1
            assert str(node.policy) in daemon.wait_for("policy_rejected", rejected)["error"]
            assert node.snapshot() == before
        node.policy.unlink()
        node.policy.mkdir()
        assert "Is a directory" in daemon.wait_for("policy_rejected", rejected + 1)["error"]
        assert node.snapshot() == before
