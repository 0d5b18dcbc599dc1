# SPDX-License-Identifier: Apache-2.0
"""Files of the history: small although a plan is long, and readable from versions that wrote plans as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from datapath.errors import InputError
from datapath.generations import Generation, History
from datapath.sealed import seal
from datapath.state import StateDirectory

PLAN = "".join(
    f"route 4 table {number} default via 198.51.100.1 dev eth0.{number}\n" for number in range(4094)
)
GENERATION = Generation(7, "2026-11-21T20:00:00+00:00", "policy.yaml", "version: 1\n", PLAN)


def test_a_long_plan_takes_little_room_and_comes_back_as_it_was(tmp_path: Path) -> None:
    history = History(StateDirectory(tmp_path))
    history.add(GENERATION)
    assert history.get(7) == GENERATION
    assert (tmp_path / "history/000007.json").stat().st_size * 5 < len(PLAN)


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    directory.write("history/000007.json", seal(GENERATION.as_json()))
    assert History(directory).get(7) == GENERATION


@pytest.mark.parametrize("plan", ["no base64", "bm90IGRlZmxhdGVk", 7])
def test_a_plan_that_cannot_be_read_is_damage(tmp_path: Path, plan: object) -> None:
    directory = StateDirectory(tmp_path)
    document = {name: value for name, value in GENERATION.as_json().items() if name != "plan"}
    path = directory.write("history/000007.json", seal(document | {"plan_zlib": plan}))
    with pytest.raises(InputError, match=f"{path}: damaged: plan_zlib: "):
        History(directory).get(7)
