# SPDX-License-Identifier: Apache-2.0
"""What no event tells of, a tcx program that comes or goes, is seen whenever it happens; without it nobody looks."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from datapath.controller import Controller
from datapath.kernel import ingress, tc
from datapath.kernel.bpf import attachments, libbpf, tcx
from datapath.kernel.bpf.glance import glance
from datapath.observe.stats import ServiceStats
from datapath.plan.tc import Direction
from datapath.policy import parse_policy
from datapath.reconcile.steps import SyncIngress
from datapath.service import loop
from datapath.service.healer import Healer
from datapath.service.loop import Service
from datapath.service.policy_files import PolicyFiles
from datapath.state import StateDirectory
from tests.netns.nodes import inside, node

pytestmark = [pytest.mark.root, pytest.mark.kernel_feature("tcx")]

POLICY = b"""version: 1
backend: ebpf
networks:
  - {name: a, interface: eth1, vips: [10.1.1.0/24, '2001:db8:1::/64'], gateway: [10.1.1.1, '2001:db8:1::1']}
  - {name: b, interface: eth2, vips: [10.1.2.0/24, '2001:db8:2::/64'], gateway: [10.1.2.1, '2001:db8:2::1']}
"""
GLANCES = 5
ENOUGH_S = 120


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StateDirectory]:
    """In a namespace where nothing is in force."""
    with node(4) as made, inside(made.namespace.name):
        yield StateDirectory(tmp_path / "state")


@pytest.fixture
def healer(directory: StateDirectory) -> Iterator[Healer]:
    """After its first look, as the daemon is when it says that it has started."""
    apply(directory)
    made = Healer(directory)
    assert not made.look().done
    yield made
    made.close()


def apply(directory: StateDirectory) -> None:
    Controller(directory).apply(parse_policy(POLICY, "policy.yaml"))


def runs() -> set[str]:
    """Devices with a program of ours."""
    return set(attachments.observe_attachments(Direction.INGRESS).attached.programs)


def detach() -> None:
    """As somebody else would: neither the healer nor an event tells of it."""
    assert attachments.detach("eth1")


def ours() -> libbpf.OwnedFd:
    (program_id,) = set(attachments.observe_attachments(Direction.INGRESS).attached.programs.values())
    return libbpf.program_fd_by_id(program_id)


def attach_before_ours() -> libbpf.OwnedFd:
    """A program of somebody else, that lets everything in; it stays with the device when it is closed."""
    code = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    result = libbpf.library().bpf_prog_load(3, b"accept_all", b"GPL", code, ctypes.c_size_t(2), None)
    loaded = libbpf.OwnedFd(libbpf.check("load", result))
    tcx.attach(socket.if_nametoindex("eth1"), Direction.INGRESS, loaded.number)
    return loaded


def during(monkeypatch: pytest.MonkeyPatch, *, before: bool, happens: Callable[[], None]) -> None:
    """Once, let something happen right before or after the programs are read."""
    real, left = ingress.observe, [happens]

    def patched(*arguments: Any) -> Any:
        if before and left:
            left.pop()()
        result = real(*arguments)
        if left:
            left.pop()()
        return result

    monkeypatch.setattr(ingress, "observe", patched)


def synced(healer: Healer) -> bool:
    return any(isinstance(step, SyncIngress) for step in healer.look().done)


def test_nothing_happened(healer: Healer) -> None:
    """Also after looks that read the programs again, and after repairs of ours."""
    assert not healer.programs_changed()
    healer.forget("*")
    assert not healer.look().done
    assert not healer.programs_changed()
    detach()
    assert healer.programs_changed()
    assert synced(healer)
    assert not healer.look().done  # the loop confirms each repair
    assert [healer.programs_changed() for _ in range(GLANCES)] == [False] * GLANCES
    assert runs() == {"eth1", "eth2"}


def test_between_two_glances(healer: Healer) -> None:
    assert not healer.programs_changed()
    detach()
    assert healer.programs_changed()
    assert synced(healer)


def test_a_program_of_others(healer: Healer) -> None:
    """It is none of ours, and no reason for a repair, but may keep packets from our own."""
    with attach_before_ours():
        assert healer.programs_changed()
    assert not synced(healer)
    assert not healer.programs_changed()


def test_a_device_that_we_gave_tcx_ourselves(healer: Healer) -> None:
    """It is no news; a program of others is, whether it came before ours or after it."""
    indexes = tc.ifindexes()
    with ours() as program:
        for when in ("never", "before", "after"):
            detach()
            tc.attach_filter("eth1", program.number)
            seen = glance([indexes["eth1"], indexes["eth2"]], Direction.INGRESS)
            theirs = attach_before_ours() if when == "before" else None
            assert attachments.move_to_tcx("eth1")
            theirs = attach_before_ours() if when == "after" else theirs
            assert not seen.holds()
            assert seen.moved("eth1").holds() is (when == "never")
            if theirs is not None:
                with theirs:
                    tcx.detach(indexes["eth1"], Direction.INGRESS, theirs.number)
    assert not healer.look().done


def test_said_once_and_not_forgotten(healer: Healer) -> None:
    """Where the look that should follow is late, it still reads the programs."""
    detach()
    assert [healer.programs_changed() for _ in range(2)] == [True, False]
    assert synced(healer)


def test_after_the_glance_and_before_they_are_read(healer: Healer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look sees it, and the glance, older than it, asks for one look more."""
    healer.forget("*")
    during(monkeypatch, before=True, happens=detach)
    assert synced(healer)
    assert runs() == {"eth1", "eth2"}


def test_after_they_were_read(healer: Healer, monkeypatch: pytest.MonkeyPatch) -> None:
    healer.forget("*")
    during(monkeypatch, before=False, happens=detach)
    assert not synced(healer)
    assert runs() == {"eth2"}
    assert healer.programs_changed()
    assert synced(healer)
    assert runs() == {"eth1", "eth2"}


def test_during_a_look_that_reads_something_else(healer: Healer) -> None:
    """It believes what was read of the programs before, and so does the glance."""
    detach()
    healer.forget(["rule"])
    assert not synced(healer)
    assert healer.programs_changed()
    assert synced(healer)


@pytest.mark.parametrize("is_in_force", [False, True], ids=["from nothing", "in force before"])
def test_no_look_without_a_change(
    directory: StateDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_in_force: bool
) -> None:
    """From the start of the daemon on, by its own timers; then somebody detaches the program."""
    if is_in_force:
        apply(directory)
    file = tmp_path / "policy.yaml"
    file.write_bytes(POLICY)
    stats = ServiceStats()
    answers: list[bool] = []
    looks: list[int] = []
    ask = Healer.programs_changed

    def counted(healer: Healer) -> bool:
        if len(answers) == GLANCES:
            detach()
            os.kill(os.getpid(), signal.SIGTERM)
        looks.append(stats.reconciles)
        answers.append(ask(healer))
        return answers[-1]

    monkeypatch.setattr(Healer, "programs_changed", counted)
    monkeypatch.setattr(loop, "PROGRAMS_POLL_S", 0.1)
    # It must end, too, where it never asks.
    ends = threading.Timer(ENOUGH_S, os.kill, (os.getpid(), signal.SIGTERM))
    ends.start()
    try:
        Service(directory, PolicyFiles(file), stats).run()
    finally:
        ends.cancel()
    assert answers == [False] * GLANCES + [True]
    assert looks == [looks[0]] * (GLANCES + 1)
    assert runs() == {"eth1", "eth2"}
