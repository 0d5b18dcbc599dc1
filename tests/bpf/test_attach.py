# SPDX-License-Identifier: Apache-2.0
"""The program on real devices, attached in either way: frames through veth pairs, metadata tags, marks in nft."""

from __future__ import annotations

import contextlib
import socket
import subprocess

import pytest
from pyroute2 import IPRoute

from datapath.errors import KernelError
from datapath.kernel import bpf
from datapath.plan.ingress import IngressNetwork, IngressPoint, IngressProgram, Verdict, VlanProtocol
from datapath.plan.tc import Hook
from tests.bpf.attaching import (
    OTHER_DEVICE,
    UNTAGGED,
    V4,
    V6,
    VLAN,
    add_classic,
    apply,
    dump,
    nft_counts,
    packets,
    program,
    tagged,
    use_hook,
)
from tests.bpf.conftest import Wire, run
from tests.bpf.packets import ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, frame

pytestmark = [pytest.mark.root, pytest.mark.bpf]

# Marks as netfilter sees them; the counters are the measurement. Tagged frames for which there is no VLAN
# device never get to the IP stack, so the netdev hook, right behind tc ingress, is where all are seen.
NFT = """
table netdev probe {
    chain seen {
        type filter hook ingress device trunk0 priority 0;
        meta mark 0x5a000100 counter comment "vlan"
        meta mark 0x5a000200 counter comment "flat"
        meta mark 0x5a000000 counter comment "none"
    }
}
"""


NFT_LOW = """
table netdev probe {
  chain seen {
    type filter hook ingress device trunk0 priority 0;
    vlan id 100 meta mark & 0xff00 == 0x100 counter comment "vlan"
    vlan id 100 meta mark & 0xff00 == 0 counter comment "none"
  }
}
"""


@pytest.fixture(
    params=[
        pytest.param(Hook.TCX, marks=pytest.mark.kernel_feature("tcx")),
        pytest.param(Hook.CLSACT, marks=pytest.mark.kernel_feature("cls_bpf")),
    ],
    autouse=True,
)
def hook(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hook:
    """Every test of this module in both ways, where the kernel has both."""
    use_hook(monkeypatch, request.param)
    return Hook(request.param)


def _attach_foreign(loaded: bpf.LoadedIngress, ifname: str, *, priority: int) -> None:
    with IPRoute() as ipr:
        ipr.tc(
            "add-filter",
            "bpf",
            index=socket.if_nametoindex(ifname),
            parent=0xFFFFFFF2,
            handle=1,
            prio=priority,
            fd=loaded.program_fd,
            name="someone_else",
            direct_action=True,
        )


@pytest.mark.vm
def test_frames_on_the_wire_are_marked_and_others_filters_still_run(
    wire: Wire, exit_stack: contextlib.ExitStack
) -> None:
    # Programs of others, before and after ours: the first sets other bits of the mark, the last one counts.
    everything = tuple(
        IngressNetwork(
            name=f"foreign{vlan}",
            slot=vlan + 1,
            fwmark=0x5A000000,
            point=IngressPoint("trunk0", VlanProtocol.DOT1Q if vlan else VlanProtocol.UNTAGGED, vlan),
            device="trunk0",
        )
        for vlan in (0, 100, 101)
    )
    run("tc", "qdisc", "add", "dev", "trunk0", "clsact")
    foreign = exit_stack.enter_context(bpf.load_ingress(IngressProgram(0xFF000000, everything)))
    _attach_foreign(foreign, "trunk0", priority=1)
    _attach_foreign(foreign, "trunk0", priority=50000)
    subprocess.run(["nft", "-f", "-"], input=NFT, text=True, check=True)

    assert apply(program(VLAN, UNTAGGED)) == {"trunk0": False}
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
    wire.send(tagged(ETH_P_IPV6, V6, (ETH_P_8021Q, 0x6064)), times=2)
    wire.send(frame(ETH_P_IPV6, V6), times=4)
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 101)), times=7)

    assert nft_counts() == {"vlan": 5, "flat": 4, "none": 7}
    assert (packets(1), packets(2)) == (5, 4)
    twice = {slot: by_verdict[Verdict.PASS].packets for slot, by_verdict in foreign.read_counters().items()}
    assert twice == {1: 2 * 4, 101: 2 * 5, 102: 2 * 7}


def test_second_apply_finds_nothing_to_do_and_changes_are_made_in_place(wire: Wire) -> None:
    apply(program(VLAN))
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
    first = bpf.observe_ingress()
    apply(program(VLAN))
    assert bpf.observe_ingress() == first
    apply(program(VLAN, UNTAGGED))
    grown = bpf.observe_ingress()
    assert set(grown.programs) == set(first.programs)
    wire.send(frame(ETH_P_IP, V4), times=2)
    assert (packets(1), packets(2)) == (3, 2)
    apply(program(UNTAGGED))
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))
    assert (packets(1), packets(2)) == (3, 2)


def test_slot_that_is_taken_over_starts_at_zero(wire: Wire) -> None:
    apply(program(VLAN))
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
    apply(program(UNTAGGED))
    apply(program(UNTAGGED, VLAN))
    assert packets(1) == 0


def test_replacement_by_a_larger_program_keeps_counting(wire: Wire) -> None:
    apply(program(VLAN, OTHER_DEVICE))
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
    (small,) = bpf.observe_ingress().programs
    many = tuple(
        IngressNetwork(
            name=f"n{vlan}",
            slot=vlan,
            fwmark=0,
            point=IngressPoint("trunk1", VlanProtocol.DOT1AD, vlan),
            device="trunk1",
        )
        for vlan in range(10, 60)
    )
    apply(program(VLAN, OTHER_DEVICE, *many))
    state = bpf.observe_ingress()
    (large,) = state.programs
    assert large != small
    assert state.programs[large].meta.capacities == bpf.Capacities(networks=64, counters=64)
    assert packets(1) == 3
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=2)
    wire.send(frame(ETH_P_IP, V4), device="wire1")
    assert (packets(1), packets(3)) == (5, 1)
    # And once more: what was carried is carried on.
    apply(IngressProgram(fwmark_mask=0xFFFF00, networks=(VLAN, OTHER_DEVICE)))
    assert (packets(1), packets(3)) == (5, 1)


def _is_loaded(program_id: int) -> bool:
    found = subprocess.run(
        ["bpftool", "prog", "show", "id", str(program_id)], capture_output=True, check=False
    )
    return found.returncode == 0


@pytest.mark.vm
@pytest.mark.usefixtures("wire")
def test_detach_leaves_everything_as_it_was(hook: Hook) -> None:
    run("tc", "qdisc", "add", "dev", "trunk1", "clsact")
    add_classic("trunk1", "egress", priority=9)
    before = dump("trunk0", "trunk1")
    assert apply(program(VLAN, OTHER_DEVICE)) == {"trunk0": hook is Hook.CLSACT, "trunk1": False}
    (program_id,) = bpf.observe_ingress().programs
    assert dump("trunk0", "trunk1") != before
    assert _is_loaded(program_id)
    apply(program())
    assert dump("trunk0", "trunk1") == before
    for _ in range(50):  # the kernel frees a program after a grace period
        if not _is_loaded(program_id):
            break
        run("sleep", "0.1")
    assert not _is_loaded(program_id)


@pytest.mark.usefixtures("wire")
def test_clsact_stays_when_someone_uses_it_or_we_did_not_make_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, Hook.CLSACT)
    assert _apply(_program(VLAN, OTHER_DEVICE)) == {"trunk0": True, "trunk1": True}
    _add_classic("trunk0", "egress", priority=9)
    assert bpf.detach("trunk0", remove_clsact=True)
    assert bpf.detach("trunk1", remove_clsact=False)
    assert bpf.observe_ingress().clsact == {"trunk0", "trunk1"}
    assert not bpf.detach("trunk1", remove_clsact=True)
    assert bpf.observe_ingress().clsact == {"trunk0"}


def test_classic_ingress_qdisc_of_someone_else_is_used_and_kept(wire: Wire) -> None:
    run("tc", "qdisc", "add", "dev", "trunk0", "ingress")
    assert _apply(_program(VLAN)) == {"trunk0": False}
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))
    assert _packets(1) == 1
    before = run("tc", "qdisc", "show", "dev", "trunk0")
    assert bpf.detach("trunk0", remove_clsact=False)
    assert run("tc", "qdisc", "show", "dev", "trunk0") == before


@pytest.mark.usefixtures("wire")
def test_filter_of_someone_else_in_our_place_is_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, Hook.CLSACT)
    run("tc", "qdisc", "add", "dev", "trunk0", "clsact")
    _add_classic("trunk0", "ingress", priority=tc.TC_PRIORITY)
    before = _dump("trunk0")
    state = bpf.observe_ingress()
    assert [name for name, _ in state.conflicts] == ["trunk0"]
    assert bpf.compare_ingress(_program(VLAN), state).conflicts == state.conflicts
    with bpf.load_ingress(_program(VLAN)) as loaded, pytest.raises(ConflictError, match="0x6470"):
        bpf.attach(loaded, "trunk0")
    assert not bpf.detach("trunk0", remove_clsact=True)
    assert _dump("trunk0") == before


@pytest.mark.kernel_feature("tcx")
@pytest.mark.usefixtures("wire")
def test_filter_of_someone_else_is_none_of_our_business_with_tcx(monkeypatch: pytest.MonkeyPatch) -> None:
    _use(monkeypatch, Hook.TCX)
    run("tc", "qdisc", "add", "dev", "trunk0", "clsact")
    _add_classic("trunk0", "ingress", priority=tc.TC_PRIORITY)
    before = _dump("trunk0")
    assert _apply(_program(VLAN)) == {"trunk0": False}
    assert bpf.observe_ingress().conflicts == ()
    _apply(_program())
    assert _dump("trunk0") == before


@pytest.mark.vm
@pytest.mark.kernel_feature("tcx")
@pytest.mark.parametrize("reverse", [False, True], ids=["to tcx", "to clsact"])
def test_migration_keeps_program_and_counts_and_no_packet_is_unmarked(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, reverse: bool
) -> None:
    subprocess.run(["nft", "-f", "-"], input=NFT_LOW, text=True, check=True)
    first, then = (Hook.TCX, Hook.CLSACT) if reverse else (Hook.CLSACT, Hook.TCX)
    _use(monkeypatch, first)
    _apply(_program(VLAN))
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
    (program_id,) = bpf.observe_ingress().programs
    _use(monkeypatch, then)
    assert (state := bpf.observe_ingress()).surplus == {"trunk0"}
    assert bpf.compare_ingress(_program(VLAN), state) == bpf.IngressDiff(attach=("trunk0",))
    sent = 0

    def send(_: str) -> None:
        nonlocal sent
        sent += 1
        wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))

    with points.listening(send):  # between any two steps
        _apply(_program(VLAN))
    assert sent >= 2
    state = bpf.observe_ingress()
    assert (set(state.programs), state.hook, set(state.surplus)) == ({program_id}, then, set())
    assert _chain("trunk0") == ((program_id,) if then is Hook.TCX else ())
    assert _nft_counts() == {"vlan": 3 + sent, "none": 0}
    # A packet that both saw is counted twice; none is counted less.
    assert 3 + sent <= _packets(1) <= 3 + 2 * sent


@pytest.mark.kernel_feature("tcx")
def test_tcx_program_goes_before_those_of_others_and_tells_who_is_before_it(
    wire: Wire, monkeypatch: pytest.MonkeyPatch, exit_stack: contextlib.ExitStack
) -> None:
    _use(monkeypatch, Hook.TCX)
    index = socket.if_nametoindex("trunk0")
    theirs = [exit_stack.enter_context(_final_program()) for _ in range(2)]
    tcx.attach(index, Direction.INGRESS, theirs[0].number)
    _apply(_program(VLAN))
    (ours,) = bpf.observe_ingress().programs
    assert _chain("trunk0")[0] == ours
    assert bpf.observe_ingress().ahead == ()
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))
    assert _packets(1) == 1
    tcx.attach(index, Direction.INGRESS, theirs[1].number)
    assert (state := bpf.observe_ingress()).ahead == (("trunk0", "accept_all"),)
    assert bpf.compare_ingress(_program(VLAN), state).is_empty
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))
    assert _packets(1) == 1
    # A new version takes our place in the chain, not a new one.
    _apply(IngressProgram(fwmark_mask=0xFFFF00, networks=(VLAN,)))
    assert (_chain("trunk0")[1],) == tuple(bpf.observe_ingress().programs) != (ours,)
    _apply(_program())
    assert len(_chain("trunk0")) == 2


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
    _use(monkeypatch, Hook.TCX)
    other = exit_stack.enter_context(bpf.load_ingress(_program(UNTAGGED)))
    _apply(_program(VLAN))
    tcx.attach(socket.if_nametoindex("trunk0"), Direction.INGRESS, other.program_fd)
    assert bpf.observe_ingress().surplus == {"trunk0"}
    _apply(_program(VLAN))
    assert len(_chain("trunk0")) == 1


@pytest.mark.usefixtures("wire")
def test_device_that_came_back_is_drift() -> None:
    desired = _program(VLAN, OTHER_DEVICE)
    _apply(desired)
    run("ip", "link", "delete", "trunk1")
    with pytest.raises(KernelError) as missing:
        bpf.compare_ingress(desired, bpf.observe_ingress())
    assert missing.value.errno == 19
    run("ip", "link", "add", "trunk1", "type", "veth", "peer", "name", "again1")
    diff = bpf.compare_ingress(desired, bpf.observe_ingress())
    assert diff.update is not None
    assert diff.attach == ("trunk1",)
    apply(desired)


@pytest.mark.vm
@pytest.mark.kernel_feature("8021q")
def test_program_on_a_vlan_device(wire: Wire) -> None:
    run("ip", "link", "add", "link", "trunk0", "name", "v100", "type", "vlan", "id", "100")
    run("ip", "link", "set", "v100", "up")
    network = IngressNetwork(name="v", slot=1, fwmark=0x100, point=IngressPoint("v100"), device="v100")
    apply(program(network))
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=2)
    assert packets(1) == 2


@pytest.mark.usefixtures("node")
def test_device_without_ethernet_header_is_refused() -> None:
    run("ip", "tuntap", "add", "dev", "tun0", "mode", "tun")
    network = IngressNetwork(name="t", slot=1, fwmark=0x100, point=IngressPoint("tun0"), device="tun0")
    with pytest.raises(KernelError, match="not an Ethernet device"):
        bpf.load_ingress(program(network))


@pytest.mark.usefixtures("node")
def test_missing_device_is_a_typed_error_but_can_be_verified() -> None:
    network = IngressNetwork(name="g", slot=1, fwmark=0x100, point=IngressPoint("ghost0"), device="ghost0")
    with pytest.raises(KernelError) as missing:
        bpf.load_ingress(program(network))
    assert missing.value.errno == 19
    bpf.verify_ingress(program(network)).close()
