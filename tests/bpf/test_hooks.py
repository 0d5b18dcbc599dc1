# SPDX-License-Identifier: Apache-2.0
"""What differs between the two ways of attaching, tcx and clsact, and moves from one to the other."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import subprocess

import pytest

from datapath import points
from datapath.errors import ConflictError
from datapath.kernel import bpf, tc
from datapath.kernel.bpf import libbpf, tcx
from datapath.plan.ingress import IngressProgram
from datapath.plan.tc import Direction, Hook
from tests.bpf.attaching import (
    OTHER_DEVICE,
    UNTAGGED,
    V4,
    VLAN,
    add_classic,
    apply,
    chain,
    dump,
    nft_counts,
    packets,
    program,
    tagged,
    use_hook,
)
from tests.bpf.conftest import Wire, run
from tests.bpf.packets import ETH_P_8021Q, ETH_P_IP

pytestmark = [pytest.mark.root, pytest.mark.bpf]

NFT_LOW = """
table netdev probe {
    chain seen {
        type filter hook ingress device trunk0 priority 0;
        vlan id 100 meta mark & 0xff00 == 0x100 counter comment "vlan"
        vlan id 100 meta mark & 0xff00 == 0 counter comment "none"
    }
}
"""


@pytest.mark.kernel_feature("cls_bpf")
@pytest.mark.usefixtures("wire")
def test_clsact_stays_when_someone_uses_it_or_we_did_not_make_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hook(monkeypatch, Hook.CLSACT)
    assert apply(program(VLAN, OTHER_DEVICE)) == {"trunk0": True, "trunk1": True}
    add_classic("trunk0", "egress", priority=9)
    assert bpf.detach("trunk0")
    tc.remove_clsact("trunk0")
    assert bpf.detach("trunk1")
    assert bpf.observe_ingress().clsact == {"trunk0", "trunk1"}
    assert not bpf.detach("trunk1")
    tc.remove_clsact("trunk1")
    assert bpf.observe_ingress().clsact == {"trunk0"}


@pytest.mark.kernel_feature("cls_bpf")
@pytest.mark.usefixtures("wire")
def test_several_devices_are_left_at_once_and_what_others_have_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hook(monkeypatch, Hook.CLSACT)
    assert apply(program(VLAN, OTHER_DEVICE)) == {"trunk0": True, "trunk1": True}
    add_classic("trunk1", "ingress", priority=tc.TC_PRIORITY + 1)
    said: list[str] = []
    with points.listening(said.append):
        assert bpf.detach("trunk0", "gone", "trunk1", "lo")
    assert said == [f"delete the ingress filter of {name}" for name in ("trunk0", "trunk1")]
    assert bpf.observe_ingress().attached == {}
    tc.remove_clsact("trunk0", "trunk1")
    assert bpf.observe_ingress().clsact == {"trunk1"}
    assert not bpf.detach("trunk0", "trunk1")


@pytest.mark.kernel_feature("cls_bpf")
@pytest.mark.usefixtures("wire")
def test_filter_of_someone_else_in_our_place_is_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hook(monkeypatch, Hook.CLSACT)
    run("tc", "qdisc", "add", "dev", "trunk0", "clsact")
    add_classic("trunk0", "ingress", priority=tc.TC_PRIORITY)
    before = dump("trunk0")
    state = bpf.observe_ingress()
    assert [name for name, _ in state.conflicts] == ["trunk0"]
    assert bpf.compare_ingress(program(VLAN), state).conflicts == state.conflicts
    with bpf.load_ingress(program(VLAN)) as loaded, pytest.raises(ConflictError, match="0x6470"):
        bpf.attach(loaded, "trunk0")
    assert not bpf.detach("trunk0")
    tc.remove_clsact("trunk0")
    assert dump("trunk0") == before


@pytest.mark.kernel_feature("tcx")
@pytest.mark.usefixtures("wire")
def test_filter_of_someone_else_is_none_of_our_business_with_tcx(monkeypatch: pytest.MonkeyPatch) -> None:
    use_hook(monkeypatch, Hook.TCX)
    run("tc", "qdisc", "add", "dev", "trunk0", "clsact")
    add_classic("trunk0", "ingress", priority=tc.TC_PRIORITY)
    before = dump("trunk0")
    assert apply(program(VLAN)) == {"trunk0": False}
    assert bpf.observe_ingress().conflicts == ()
    apply(program())
    assert dump("trunk0") == before


@pytest.mark.vm
@pytest.mark.kernel_feature("cls_bpf", "tcx")
@pytest.mark.parametrize("reverse", [False, True], ids=["to tcx", "to clsact"])
def test_migration_keeps_program_and_counts_and_no_packet_is_unmarked(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    subprocess.run(["nft", "-f", "-"], input=NFT_LOW, text=True, check=True)
    first, then = (Hook.TCX, Hook.CLSACT) if reverse else (Hook.CLSACT, Hook.TCX)
    use_hook(monkeypatch, first)
    apply(program(VLAN))
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
    (program_id,) = bpf.observe_ingress().programs
    use_hook(monkeypatch, then)
    state = bpf.observe_ingress()
    assert state.surplus == {"trunk0"}
    assert bpf.compare_ingress(program(VLAN), state) == bpf.IngressDiff(attach=("trunk0",))
    sent = 0

    def send(_: str) -> None:
        nonlocal sent
        sent += 1
        wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))

    with points.listening(send):  # between any two steps
        apply(program(VLAN))
    assert sent >= 2
    state = bpf.observe_ingress()
    assert (set(state.programs), state.hook) == ({program_id}, then)
    assert not state.surplus
    assert chain("trunk0") == ((program_id,) if then is Hook.TCX else ())
    assert nft_counts() == {"vlan": 3 + sent, "none": 0}
    # A packet that both saw is counted twice; none is counted less.
    assert 3 + sent <= packets(1) <= 3 + 2 * sent


@pytest.mark.kernel_feature("tcx")
def test_tcx_program_goes_before_those_of_others_and_tells_who_is_before_it(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, exit_stack: contextlib.ExitStack
) -> None:
    use_hook(monkeypatch, Hook.TCX)
    index = socket.if_nametoindex("trunk0")
    theirs = [exit_stack.enter_context(_final_program()) for _ in range(2)]
    tcx.attach(index, Direction.INGRESS, theirs[0].number)
    apply(program(VLAN))
    (ours,) = bpf.observe_ingress().programs
    assert chain("trunk0")[0] == ours
    assert bpf.observe_ingress().ahead == ()
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))
    assert packets(1) == 1
    tcx.attach(index, Direction.INGRESS, theirs[1].number)
    state = bpf.observe_ingress()
    assert state.ahead == (("trunk0", "accept_all"),)
    assert bpf.compare_ingress(program(VLAN), state).is_empty
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))
    assert packets(1) == 1
    # A new version takes our place in the chain, not a new one.
    apply(IngressProgram(fwmark_mask=0xFFFF00, networks=(VLAN,)))
    (new,) = bpf.observe_ingress().programs
    assert chain("trunk0")[1] == new != ours
    apply(program())
    assert len(chain("trunk0")) == 2


def _final_program() -> libbpf.OwnedFd:
    """A program of somebody else that answers TC_ACT_OK: nobody behind it sees the packet."""
    code = struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0)
    result = libbpf.library().bpf_prog_load(3, b"accept_all", b"GPL", code, ctypes.c_size_t(2), None)
    return libbpf.OwnedFd(libbpf.check("load", result))


@pytest.mark.kernel_feature("tcx")
@pytest.mark.usefixtures("wire")
def test_second_program_of_ours_is_surplus(
    monkeypatch: pytest.MonkeyPatch, exit_stack: contextlib.ExitStack
) -> None:
    use_hook(monkeypatch, Hook.TCX)
    other = exit_stack.enter_context(bpf.load_ingress(program(UNTAGGED)))
    apply(program(VLAN))
    tcx.attach(socket.if_nametoindex("trunk0"), Direction.INGRESS, other.program_fd)
    assert bpf.observe_ingress().surplus == {"trunk0"}
    apply(program(VLAN))
    assert len(chain("trunk0")) == 1
