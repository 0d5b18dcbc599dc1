# SPDX-License-Identifier: Apache-2.0
"""One device moves from its filter to tcx: what others have there stays, and what is not ours alone to say is left."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from datapath import points
from datapath.kernel import bpf, tc
from datapath.kernel.bpf import attachments, tcx
from datapath.plan.tc import Direction, Hook
from tests.bpf.attaching import V4, VLAN, add_classic, chain, dump, packets, program, tagged, use_hook
from tests.bpf.conftest import Wire, run
from tests.bpf.packets import ETH_P_8021Q, ETH_P_IP

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.kernel_feature("cls_bpf", "tcx")]


@pytest.fixture
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bpf.LoadedIngress]:
    """Attached to trunk0 as a filter, where there is tcx."""
    request.getfixturevalue("wire")
    use_hook(monkeypatch, Hook.TCX)
    with bpf.load_ingress(program(VLAN)) as loaded:
        tc.attach_filter("trunk0", loaded.program_fd)
        yield loaded


def _filter_is_there() -> bool:
    return tc.our_program(socket.if_nametoindex("trunk0"), Direction.INGRESS) is not None


def test_device_is_served_before_during_and_after(ours: bpf.LoadedIngress, wire: Wire) -> None:
    assert not chain("trunk0")
    said: list[str] = []

    def at_each_point(name: str) -> None:
        said.append(name)
        wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))

    with points.listening(at_each_point):
        assert attachments.move_to_tcx("trunk0")
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))
    assert said == ["attach the ingress program to trunk0", "delete the ingress filter of trunk0"]
    # The second one met the program twice.
    assert packets(1) == 4
    assert chain("trunk0") == (ours.program_id,)
    assert not _filter_is_there()
    # Taking an ingress qdisc off would make the device drop what it has to send.
    assert "clsact" in run("tc", "qdisc", "show", "dev", "trunk0")
    assert not attachments.move_to_tcx("trunk0")


def test_what_was_interrupted_is_finished(ours: bpf.LoadedIngress) -> None:
    tcx.attach(socket.if_nametoindex("trunk0"), Direction.INGRESS, ours.program_fd)
    assert attachments.move_to_tcx("trunk0")
    assert chain("trunk0") == (ours.program_id,)
    assert not _filter_is_there()


def test_what_others_have_stays(ours: bpf.LoadedIngress, exit_stack: contextlib.ExitStack) -> None:
    add_classic("trunk0", "ingress", priority=tc.TC_PRIORITY + 1)
    theirs = exit_stack.enter_context(bpf.load_ingress(program()))
    with pytest.MonkeyPatch.context() as patch:
        # A program by another name is somebody else's.
        patch.setattr(attachments, "PROGRAM_NAMES", {Direction.INGRESS: "another", Direction.EGRESS: ""})
        tcx.attach(socket.if_nametoindex("trunk0"), Direction.INGRESS, theirs.program_fd)
        assert attachments.move_to_tcx("trunk0")
    assert chain("trunk0") == (ours.program_id, theirs.program_id)
    assert not _filter_is_there()
    assert "pref 78" in run("tc", "filter", "show", "dev", "trunk0", "ingress")


def test_two_programs_of_ours_and_a_filter_of_others_are_not_touched(
    ours: bpf.LoadedIngress, exit_stack: contextlib.ExitStack
) -> None:
    second = exit_stack.enter_context(bpf.load_ingress(program()))
    assert second.program_id != ours.program_id
    tcx.attach(socket.if_nametoindex("trunk0"), Direction.INGRESS, second.program_fd)
    run("tc", "qdisc", "add", "dev", "trunk1", "clsact")
    add_classic("trunk1", "ingress", priority=tc.TC_PRIORITY)
    before = dump("trunk0", "trunk1")
    assert not attachments.move_to_tcx("trunk0")
    assert not attachments.move_to_tcx("trunk1")
    assert not attachments.move_to_tcx("gone")
    assert dump("trunk0", "trunk1") == before
