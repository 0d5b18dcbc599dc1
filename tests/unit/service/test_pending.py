# SPDX-License-Identifier: Apache-2.0
"""Whether a change waits for its confirmation is asked every few seconds: the file is read when it is another one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from datapath.errors import InputError
from datapath.state import Pending, State, StateDirectory, current_netns

QUIET = State(netns=current_netns())
WAITS = State(netns=current_netns(), pending=Pending("token", 1, 1e9))


def never(_: StateDirectory) -> State:
    raise AssertionError("the file was read")


def test_what_another_process_writes_is_seen(tmp_path: Path) -> None:
    daemon, other = StateDirectory(tmp_path), StateDirectory(tmp_path)
    assert daemon.pending() is None
    for state in (QUIET, WAITS, WAITS, QUIET, WAITS):
        other.save(state)
        assert daemon.pending() == state.pending
        assert daemon.pending() == state.pending
    other.file("state.json").unlink()
    assert daemon.pending() is None


def test_a_file_that_is_the_same_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StateDirectory(tmp_path)
    directory.save(QUIET)
    assert directory.pending() is None
    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "load", never)
        assert directory.pending() is None
        directory.save(QUIET)
        with pytest.raises(AssertionError):
            directory.pending()
    assert directory.pending() is None


def test_who_has_read_it_for_another_reason_need_not_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = StateDirectory(tmp_path)
    directory.save(QUIET)
    assert directory.load().pending is None
    directory.forget()
    with monkeypatch.context() as patch:
        patch.setattr(StateDirectory, "load", never)
        assert directory.pending() is None
    directory.save(WAITS)
    assert directory.load().pending == directory.pending() == WAITS.pending


def test_damage_in_place_is_seen(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    directory.save(QUIET)
    assert directory.pending() is None
    path = directory.file("state.json")
    text = path.read_text()
    path.write_text(text.replace('"generation": 0', '"generation": 9'))
    os.utime(path, ns=(0, 0))
    with pytest.raises(InputError):
        directory.pending()
