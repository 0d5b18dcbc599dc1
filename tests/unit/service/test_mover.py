# SPDX-License-Identifier: Apache-2.0
"""When the daemon moves a device to tcx, and how long it rests: by a clock of our own."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from datapath.errors import KernelError
from datapath.observe.stats import ServiceStats
from datapath.service import mover as module
from datapath.service.mover import Mover
from datapath.service.timers import Timers
from datapath.state import StateDirectory


class Machine:
    """A loop that has nothing else to do, and a kernel that takes 4 to 20 ms for each device."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.held = 0.0
        self.moved: list[str] = []
        self.told: list[str] = []
        self.refused = ""
        self.timers, self.stats = Timers(), ServiceStats()
        self.directory = StateDirectory(folder)
        self._random = random.Random(1)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(module, "move_to_tcx", self._move)
        self.mover = Mover(self.directory, self.timers, self.stats, self.told.append)

    def _move(self, ifname: str) -> bool:
        took = self._random.uniform(0.004, 0.02)
        self.now += took
        self.held += took
        if ifname == self.refused:
            raise KernelError(f"attach to {ifname}", "no room", errno=errno.ERANGE)
        self.moved.append(ifname)
        return True

    def run(self, seconds: float) -> None:
        """What is due by then."""
        end = self.now + seconds
        while (wait := self.timers.wait_s(self.now)) is not None and self.now + wait < end:
            self.now += wait
            for action in self.timers.due(self.now):
                action()
        self.now = max(self.now, end)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


NAMES = frozenset(f"n{number}" for number in range(400))


def test_at_most_a_fifth_of_the_lock_is_taken(machine: Machine) -> None:
    machine.mover.follow(NAMES)
    began = machine.now
    while machine.mover.left:
        before = len(machine.moved)
        machine.run(1.0)
        assert machine.held <= 0.2 * (machine.now - began)
        assert machine.stats.filtered == len(NAMES) - len(machine.moved)
        assert before < len(machine.moved) or machine.now - began < 2.0
    assert sorted(machine.moved) == sorted(machine.told) == sorted(NAMES)
    assert machine.timers.wait_s(machine.now) is None


def test_whatever_else_happens_goes_first_but_not_for_ever(machine: Machine) -> None:
    machine.mover.follow(NAMES)
    for _ in range(5):
        machine.mover.pause()
        machine.run(0.9)
    assert not machine.moved
    for _ in range(100):
        machine.mover.pause()
        machine.run(0.9)
    assert 20 < len(machine.moved) < 150
    machine.mover.follow(frozenset())
    before = len(machine.moved)
    machine.run(100.0)
    assert len(machine.moved) == before
    assert machine.timers.wait_s(machine.now) is None


def test_another_process_that_changes_something_is_waited_for(machine: Machine) -> None:
    machine.mover.follow(NAMES)
    with StateDirectory(machine.directory.path).locked():
        machine.run(30.0)
        assert not machine.moved
    machine.run(30.0)
    assert machine.moved


def test_a_device_that_refuses_keeps_no_other_waiting(machine: Machine) -> None:
    machine.refused = "n7"
    machine.mover.follow(NAMES)
    machine.run(600.0)
    assert sorted(machine.moved) == sorted(NAMES - {"n7"})
    assert machine.stats.filtered == 1
    # A look finds it every few minutes.
    held = machine.held
    machine.mover.follow(frozenset({"n7"}))
    machine.run(60.0)
    assert machine.held == held
    assert machine.stats.filtered == 1
    machine.refused = ""
    machine.now += 600.0
    machine.mover.follow(frozenset({"n7"}))
    machine.run(60.0)
    assert "n7" in machine.moved
    assert machine.stats.filtered == 0
