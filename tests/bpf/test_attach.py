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


@pytest.fixture(
    params=[
        pytest.param(Hook.TCX, marks=pytest.mark.kernel_feature("tcx")),
        pytest.param(
            Hook.CLSACT, marks=[pytest.mark.kernel_feature("cls_bpf"), pytest.mark.one_kernel("6.1")]
        ),
    ],
    autouse=True,
)
def hook(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hook:
    """Every test of this module in both ways, where the kernel has both.

    Left out: filters on 6.12, which has tcx; 6.1 has nothing else.
    """
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


def test_classic_ingress_qdisc_of_someone_else_is_used_and_kept(wire: Wire) -> None:
    run("tc", "qdisc", "add", "dev", "trunk0", "ingress")
    assert apply(program(VLAN)) == {"trunk0": False}
    wire.send(tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))
    assert packets(1) == 1
    before = run("tc", "qdisc", "show", "dev", "trunk0")
    assert bpf.detach("trunk0")
    assert run("tc", "qdisc", "show", "dev", "trunk0") == before


@pytest.mark.usefixtures("wire")
def test_device_that_came_back_is_drift() -> None:
    desired = program(VLAN, OTHER_DEVICE)
    apply(desired)
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
