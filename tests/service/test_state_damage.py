# SPDX-License-Identifier: Apache-2.0
"""Files of the state directory that are damaged, of a newer version, or left half-written: said, and survived."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from datapath import cli
from datapath.errors import InputError
from datapath.generations import History
from datapath.sealed import seal
from datapath.state import StateDirectory
from tests.faults.zygote import Zygote
from tests.netns.nodes import inside, quick_dump
from tests.service.daemon import DEVICES, FIRST, SECOND, Daemon, Node, policy
from tools.lab.dump import difference

pytestmark = pytest.mark.root

_STATE = "state.json"
FILES = (_STATE, "history/000001.json", "history/000002.json", "daemon.json")
VERBS = ("apply", "rollback", "restore", "history", "status", "facts", "confirm", "teardown")
#: Verbs that read a file, so that they must fail when it is damaged. Nobody needs the others.
READERS = {
    _STATE: frozenset(VERBS) - {"history"},
    "history/000001.json": frozenset({"rollback", "history"}),
    "history/000002.json": frozenset({"history"}),
    "daemon.json": frozenset(),
}


def _garbled(data: bytes) -> bytes:
    """One letter of the policy in it: still JSON, still a policy, another one."""
    return data.replace(b"203.0.", b"203.1.") if b"203.0." in data else data[:-4] + b"\xff" + data[-3:]


def _wrong_type(data: bytes) -> bytes:
    document = {**json.loads(data), "policy": 7}
    document.pop("sha256", None)
    return seal(document).encode()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "last byte but one missing": lambda data: data[:-2],
    "garbled": _garbled,
    "zeros, as after a power loss": lambda data: bytes(len(data)),
    "null": lambda _: b"null\n",
    "a list": lambda _: b"[]\n",
    "nested too deep": lambda _: b"[" * 200_000,
    "no key of ours": lambda _: b"{}\n",
    "a value of another type": _wrong_type,
}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Generation 2, two networks; the policy file has another."""
    made = Node(tmp_path_factory.mktemp("node"))
    for networks in ((FIRST,), (FIRST, SECOND)):
        made.policy.write_text(policy(*networks))
        done = made.datapath("apply", str(made.policy))
        assert done.returncode == 0, done.stderr
    made.policy.write_text(policy(SECOND))
    (made.state / "daemon.json").write_text(json.dumps({"policy_files": "0"}))
    yield made
    made.close()


def _run(node: Node, verb: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The command line in this process: its status and what it said. An unexpected error is raised here."""
    arguments = [str(node.policy)] if verb == "apply" else []
    with inside(node.ns.name):
        status = cli.main([verb, *arguments, "--state-dir", str(node.state)])
    return status, capsys.readouterr().err


def _dump(node: Node) -> dict[str, str]:
    with inside(node.ns.name):
        return quick_dump(DEVICES)


def _assert_says(node: Node, name: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = _dump(node)
    damaged = (node.state / name).read_bytes() if (node.state / name).is_file() else b""
    status, said = _run(node, verb, capsys)
    assert status == 2, said
    assert str(node.state / name) in said
    assert "hint: " in said
    assert difference(before, _dump(node)) == ""
    if damaged:
        assert (node.state / name).read_bytes() == damaged, "what is left of it stays for those who repair it"


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [name for name in FILES if READERS[name]])
def test_damaged_file_is_named_by_all_who_read_it(
    node: Node, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = node.state / name
    good = path.read_bytes()
    path.write_bytes(DAMAGES[damage](good))
    try:
        for verb in sorted(READERS[name]):
            _assert_says(node, name, verb, capsys)
    finally:
        path.write_bytes(good)


@pytest.mark.parametrize("name", [_STATE, "history/000001.json"])
def test_directory_in_the_place_of_a_file(node: Node, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = node.state / name
    path.rename(node.folder / "aside")
    path.mkdir()
    try:
        for verb in sorted(READERS[name]):
            _assert_says(node, name, verb, capsys)
    finally:
        path.rmdir()
        (node.folder / "aside").rename(path)


@pytest.mark.parametrize("verb", sorted(READERS[_STATE]))
def test_state_of_a_newer_version(node: Node, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What else is in it, only that version knows."""
    path = node.state / _STATE
    good = path.read_bytes()
    path.write_text(seal({"format": 2, "boot": 7, "everything": "else"}))
    try:
        status, said = _run(node, verb, capsys)
        assert status == 2
        assert f"{path}: written by a newer version of datapath (format 2)" in said
        assert "hint: upgrade" in said
    finally:
        path.write_bytes(good)


def test_nobody_needs_the_memory_of_the_daemon(node: Node) -> None:
    """A daemon whose memory is damaged takes the files for new."""
    text = policy(FIRST, SECOND)
    node.policy.write_text(text)
    for damage in DAMAGES.values():
        (node.state / "daemon.json").write_bytes(damage(b'{"policy_files": "0"}\n'))
    with Daemon(node) as daemon:
        daemon.started()
        assert daemon.wait_for("policy_in_force")["steps"] == 0
    node.policy.write_text(policy(SECOND))


def test_daemon_does_not_start_on_a_damaged_state(node: Node) -> None:
    path = node.state / _STATE
    good, before = path.read_bytes(), _dump(node)
    path.write_bytes(good[:100])
    try:
        with Daemon(node) as daemon:
            assert daemon.process.wait(20) == 2
            said = daemon.log_path.read_text()
    finally:
        path.write_bytes(good)
    assert str(path) in said
    assert "Traceback" not in said
    assert difference(before, _dump(node)) == ""


def test_half_written_files_of_a_crash_are_nobodys_state(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in FILES:
        path = node.state / name
        path.with_suffix(path.suffix + ".new").write_bytes(path.read_bytes()[:50])
    (node.state / "history" / "000009.json.new").write_bytes(b"{")
    before = _dump(node)
    for verb in ("status", "history", "facts", "restore"):
        status, said = _run(node, verb, capsys)
        assert status == 0, said
    assert difference(before, _dump(node)) == ""
    assert _run(node, "apply", capsys)[0] == 0
    assert _run(node, "rollback", capsys)[0] == 0
    assert _run(node, "status", capsys)[0] == 0, "no drift"


def test_a_key_that_leads_elsewhere_is_no_sysctl(node: Node) -> None:
    path = node.state / _STATE
    good = path.read_bytes()
    try:
        for key in ("net/ipv4/conf/../../../kernel/panic", "kernel/panic", "/etc/passwd", "net/ipv4"):
            document = json.loads(good)
            del document["sha256"]
            document["sysctls"][key] = ["1", "0"]
            path.write_text(seal(document))
            with inside(node.ns.name), pytest.raises(InputError, match="sysctls"):
                StateDirectory(node.state).load()
    finally:
        path.write_bytes(good)


def test_power_loss_between_any_two_writes_leaves_a_policy_to_restore(
    node: Node, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the state speaks of is in the history already when it says so."""
    state = tmp_path / "state"
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text(policy(FIRST))
    two.write_text(policy(FIRST, SECOND))
    with Zygote(node.ns) as zygote:
        assert not zygote.ask("apply", state, policy=str(one))["error"]
        points = zygote.ask("apply", state, policy=str(two))["points"]
        writes = [number for number, name in enumerate(points) if name.startswith(("write ", "rename "))]
        assert len(writes) >= 6, points
        for number in writes:
            assert not zygote.ask("apply", state, policy=str(one))["error"]
            assert zygote.ask("apply", state, policy=str(two), kill_at=number) == {"killed": True}
            with inside(node.ns.name):
                last = StateDirectory(state).load()
            kept = History(StateDirectory(state)).get(last.generation)
            assert kept.policy == last.policy, points[number]
        assert not zygote.ask("teardown", state)["error"]
    for verb in ("apply", "rollback"):
        assert _run(node, verb, capsys)[0] == 0, "the node's own policy again, for the other tests"


def test_lost_files_are_no_damage(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    """Somebody removed the folder of past policies: there is nothing to go back to, and nothing else is wrong."""
    history = node.state / "history"
    history.rename(node.folder / "aside")
    try:
        status, said = _run(node, "rollback", capsys)
        assert (status, "no earlier policy" in said) == (2, True)
        assert _run(node, "history", capsys)[0] == 0
        assert _run(node, "status", capsys)[0] == 0
    finally:
        (node.folder / "aside").rename(history)
