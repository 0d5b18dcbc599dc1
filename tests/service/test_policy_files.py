# SPDX-License-Identifier: Apache-2.0
"""Several files as one policy: order, positions of problems, and what counts as a change."""

from __future__ import annotations

from pathlib import Path

import pytest

from datapath.errors import CompileError, InputError, PolicyError, Problem
from datapath.policy import parse_policy
from datapath.service.backoff import FREE_REPAIRS, LONGEST_DELAY_S, Backoff
from datapath.service.policy_files import PolicyFiles
from datapath.service.timers import Timers
from tests.service.daemon import FIRST, SECOND, network, policy


def _files(folder: Path, **drop_ins: str) -> PolicyFiles:
    (folder / "policy.yaml").write_text(policy(FIRST))
    (folder / "d").mkdir()
    for name, text in drop_ins.items():
        (folder / "d" / f"{name}.yaml").write_text(text)
    return PolicyFiles(folder / "policy.yaml", folder / "d")


def test_networks_come_in_the_order_of_file_names(tmp_path: Path) -> None:
    third = network("third", "eth2", 115)
    loaded = _files(
        tmp_path, b=f"version: 1\nnetworks:\n{SECOND}", a=f"version: 1\nnetworks:\n{third}"
    ).load()
    assert [item.name for item in loaded.policy.networks] == ["first", "third", "second"]


def test_the_text_of_the_whole_gives_the_same_policy(tmp_path: Path) -> None:
    """It is what the state directory keeps, and what a rollback reads."""
    loaded = _files(tmp_path, a=f"version: 1\nnetworks:\n{SECOND}").load()
    assert parse_policy(loaded.source.text.encode(), "x").policy == loaded.policy


def test_without_drop_ins_the_text_is_the_file(tmp_path: Path) -> None:
    assert _files(tmp_path).load().source.text == policy(FIRST)


def test_a_name_in_two_files_shows_both_places(tmp_path: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        _files(tmp_path, a=f"version: 1\nnetworks:\n{network('first', 'eth5', 119)}").load()
    assert f"{tmp_path}/d/a.yaml:3:11" in caught.value.rendered
    assert f"is taken at {tmp_path}/policy.yaml:5:11" in caught.value.rendered


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("version: 1\nnetworks:\n  - name: x\n    vips: [nonsense]\n", "a.yaml:4:12"),
        ("version: 1\nnode: {}\n", "a.yaml:2:1"),
        ("version: 2\nnetworks: []\n", "a.yaml:1:10"),
        ("version: 1\nnetworks: [\n", "a.yaml:3:1"),
        ("networks: 7\nversion: 1\n", "a.yaml:1:11"),
        ("- x\n", "a.yaml:1:1"),
    ],
)
def test_problems_are_where_they_are(tmp_path: Path, text: str, where: str) -> None:
    with pytest.raises(PolicyError) as caught:
        _files(tmp_path, a=text).load()
    assert where in caught.value.rendered


def test_problems_that_only_the_host_makes_are_placed_too(tmp_path: Path) -> None:
    loaded = _files(tmp_path, a=f"version: 1\nnetworks:\n{SECOND}").load()
    error = loaded.source.error(CompileError((Problem(("networks", 1, "name"), "taken"),)).problems)
    assert f"{tmp_path}/d/a.yaml:3:11: error: networks[0].name: taken" in error.rendered


def test_an_unreadable_file_is_an_input_error(tmp_path: Path) -> None:
    files = _files(tmp_path)
    (tmp_path / "d" / "a.yaml").symlink_to("nowhere")
    with pytest.raises(InputError, match="cannot read"):
        files.load()


def test_what_counts_as_a_change(tmp_path: Path) -> None:
    files = _files(tmp_path)
    seen = {files.fingerprint()}
    (tmp_path / "d" / ".a.yaml.swp").write_text("x")
    (tmp_path / "d" / "readme").write_text("x")
    assert files.fingerprint() in seen
    for act in (
        lambda: (tmp_path / "d" / "a.yaml").write_text("x"),
        lambda: (tmp_path / "d" / "a.yaml").chmod(0o600),
        (tmp_path / "d" / "a.yaml").unlink,
        (tmp_path / "policy.yaml").unlink,
    ):
        before = files.fingerprint()
        act()
        assert files.fingerprint() != before


def test_backoff_starts_late_doubles_and_is_capped() -> None:
    backoff = Backoff()
    delays = [backoff.repaired("table", 0.0) for _ in range(FREE_REPAIRS + 12)]
    assert delays[:FREE_REPAIRS] == [0.0] * FREE_REPAIRS
    assert delays[FREE_REPAIRS : FREE_REPAIRS + 3] == [0.5, 1.0, 2.0]
    assert max(delays) == LONGEST_DELAY_S
    assert backoff.holds("table", LONGEST_DELAY_S - 1)
    assert not backoff.holds("table", LONGEST_DELAY_S)
    assert not backoff.holds("rule", 0.0)
    assert backoff.next_s(1.0) == LONGEST_DELAY_S
    assert backoff.forget_quiet(80.0) == frozenset()
    assert backoff.forget_quiet(100.0) == {"table"}
    assert backoff.repaired("table", 100.0) == 0.0


def test_timers_debounce_with_a_bound() -> None:
    timers, ran = Timers(), []

    def action() -> None:
        ran.append(1)

    for step in range(10):
        timers.debounce(action, 0.03 * step, 0.05, 0.1)
        assert timers.wait_s(0.03 * step) is not None
    assert timers.wait_s(0.0) == pytest.approx(0.1), "not 0.05 after the last of them"
    for due in timers.due(0.1):
        due()
    assert ran == [1]
    assert timers.wait_s(0.2) is None
