# SPDX-License-Identifier: Apache-2.0
"""The program on real devices: frames through veth pairs, tags in metadata, marks seen by nft."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from pyroute2 import IPRoute

from datapath.errors import ConflictError, KernelError
from datapath.kernel import bpf, tc
from datapath.plan.ingress import IngressNetwork, IngressPoint, IngressProgram, Verdict, VlanProtocol
from tests.bpf.conftest import Wire, run
from tests.bpf.packets import ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, frame, ipv4, ipv6

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bpf.packets import Tag

pytestmark = [pytest.mark.root, pytest.mark.bpf]

MASK = 0xFF00
VLAN = IngressNetwork(
    name="vlan", slot=1, fwmark=0x100, point=IngressPoint("trunk0", VlanProtocol.DOT1Q, 100), device="trunk0"
)
UNTAGGED = IngressNetwork(name="flat", slot=2, fwmark=0x200, point=IngressPoint("trunk0"), device="trunk0")
OTHER_DEVICE = IngressNetwork(
    name="other", slot=3, fwmark=0x300, point=IngressPoint("trunk1"), device="trunk1"
)

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


@pytest.fixture
def exit_stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def _program(*networks: IngressNetwork) -> IngressProgram:
    return IngressProgram(fwmark_mask=MASK, networks=networks)


def _apply(desired: IngressProgram) -> dict[str, bool]:
    """The controller's part in short; which devices got a clsact from us."""
    actual = bpf.observe_ingress()
    diff = bpf.compare_ingress(desired, actual)
    created: dict[str, bool] = {}
    if diff.reload:
        with bpf.load_ingress(desired) as loaded:
            results = bpf.switch(loaded, actual, diff.attach)
            created = {name: result.created_clsact for name, result in results.items()}
    else:
        if diff.update is not None:
            bpf.update_entries(diff.update, desired)
        if diff.attach:
            with bpf.LoadedIngress.open(next(iter(actual.programs))) as loaded:
                created = {name: bpf.attach(loaded, name).created_clsact for name in diff.attach}
    for name in diff.detach:
        bpf.detach(name, remove_clsact=True)
    assert bpf.compare_ingress(desired, bpf.observe_ingress()).is_empty
    return created


def _packets(slot: int) -> int:
    state = bpf.observe_ingress()
    (program_id,) = state.programs
    counters = bpf.read_counters(program_id)
    return counters[slot][Verdict.PASS].packets if slot in counters else 0


def _nft_counts() -> dict[str, int]:
    listing = run("nft", "list", "table", "netdev", "probe")
    return {name: int(count) for count, name in re.findall(r'packets (\d+) .*comment "(\w+)"', listing)}


def _tagged(ethertype: int, payload: bytes, tag: Tag) -> bytes:
    return frame(ethertype, payload, (tag,))


V4 = ipv4("192.0.2.1", "198.51.100.1")
V6 = ipv6("2001:db8::1", "2001:db8:1::1")


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

    assert _apply(_program(VLAN, UNTAGGED)) == {"trunk0": False}
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
    wire.send(_tagged(ETH_P_IPV6, V6, (ETH_P_8021Q, 0x6064)), times=2)
    wire.send(frame(ETH_P_IPV6, V6), times=4)
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 101)), times=7)

    assert _nft_counts() == {"vlan": 5, "flat": 4, "none": 7}
    assert (_packets(1), _packets(2)) == (5, 4)
    twice = {slot: by_verdict[Verdict.PASS].packets for slot, by_verdict in foreign.read_counters().items()}
    assert twice == {1: 2 * 4, 101: 2 * 5, 102: 2 * 7}


def test_second_apply_finds_nothing_to_do_and_changes_are_made_in_place(wire: Wire) -> None:
    _apply(_program(VLAN))
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
    first = bpf.observe_ingress()
    _apply(_program(VLAN))
    assert bpf.observe_ingress() == first
    _apply(_program(VLAN, UNTAGGED))
    grown = bpf.observe_ingress()
    assert set(grown.programs) == set(first.programs)
    wire.send(frame(ETH_P_IP, V4), times=2)
    assert (_packets(1), _packets(2)) == (3, 2)
    _apply(_program(UNTAGGED))
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)))
    assert (_packets(1), _packets(2)) == (3, 2)


def test_slot_that_is_taken_over_starts_at_zero(wire: Wire) -> None:
    _apply(_program(VLAN))
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
    _apply(_program(UNTAGGED))
    _apply(_program(UNTAGGED, VLAN))
    assert _packets(1) == 0


def test_replacement_by_a_larger_program_keeps_counting(wire: Wire) -> None:
    _apply(_program(VLAN, OTHER_DEVICE))
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=3)
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
    _apply(_program(VLAN, OTHER_DEVICE, *many))
    state = bpf.observe_ingress()
    (large,) = state.programs
    assert large != small
    assert state.programs[large].meta.capacities == bpf.Capacities(networks=64, counters=64)
    assert _packets(1) == 3
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=2)
    wire.send(frame(ETH_P_IP, V4), device="wire1")
    assert (_packets(1), _packets(3)) == (5, 1)
    # And once more: what was carried is carried on.
    _apply(IngressProgram(fwmark_mask=0xFFFF00, networks=(VLAN, OTHER_DEVICE)))
    assert (_packets(1), _packets(3)) == (5, 1)


def _dump(*devices: str) -> str:
    shown = [run("tc", "qdisc", "show")]
    for device in devices:
        shown += [run("tc", "filter", "show", "dev", device, hook) for hook in ("ingress", "egress")]
    return "".join(shown)


def _add_classic(device: str, hook: str, *, priority: int) -> None:
    """A filter of someone else: classic BPF, which needs no other kernel module than ours does."""
    filter_ = ["tc", "filter", "add", "dev", device, hook, "pref", str(priority), "handle", hex(tc.TC_HANDLE)]
    run(*filter_, "bpf", "bytecode", "1,6 0 0 0,", "flowid", "1:1")


def _is_loaded(program_id: int) -> bool:
    found = subprocess.run(
        ["bpftool", "prog", "show", "id", str(program_id)], capture_output=True, check=False
    )
    return found.returncode == 0


@pytest.mark.vm
@pytest.mark.usefixtures("wire")
def test_detach_leaves_everything_as_it_was() -> None:
    run("tc", "qdisc", "add", "dev", "trunk1", "clsact")
    _add_classic("trunk1", "egress", priority=9)
    before = _dump("trunk0", "trunk1")
    assert _apply(_program(VLAN, OTHER_DEVICE)) == {"trunk0": True, "trunk1": False}
    (program_id,) = bpf.observe_ingress().programs
    assert _dump("trunk0", "trunk1") != before
    assert _is_loaded(program_id)
    _apply(_program())
    assert _dump("trunk0", "trunk1") == before
    for _ in range(50):  # the kernel frees a program after a grace period
        if not _is_loaded(program_id):
            break
        run("sleep", "0.1")
    assert not _is_loaded(program_id)


@pytest.mark.usefixtures("wire")
def test_clsact_stays_when_someone_uses_it_or_we_did_not_make_it() -> None:
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
def test_filter_of_someone_else_in_our_place_is_a_conflict() -> None:
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
    _apply(desired)


@pytest.mark.vm
@pytest.mark.kernel_feature("8021q")
def test_program_on_a_vlan_device(wire: Wire) -> None:
    run("ip", "link", "add", "link", "trunk0", "name", "v100", "type", "vlan", "id", "100")
    run("ip", "link", "set", "v100", "up")
    network = IngressNetwork(name="v", slot=1, fwmark=0x100, point=IngressPoint("v100"), device="v100")
    _apply(_program(network))
    wire.send(_tagged(ETH_P_IP, V4, (ETH_P_8021Q, 100)), times=2)
    assert _packets(1) == 2


@pytest.mark.usefixtures("node")
def test_device_without_ethernet_header_is_refused() -> None:
    run("ip", "tuntap", "add", "dev", "tun0", "mode", "tun")
    network = IngressNetwork(name="t", slot=1, fwmark=0x100, point=IngressPoint("tun0"), device="tun0")
    with pytest.raises(KernelError, match="not an Ethernet device"):
        bpf.load_ingress(_program(network))


@pytest.mark.usefixtures("node")
def test_missing_device_is_a_typed_error_but_can_be_verified() -> None:
    network = IngressNetwork(name="g", slot=1, fwmark=0x100, point=IngressPoint("ghost0"), device="ghost0")
    with pytest.raises(KernelError) as missing:
        bpf.load_ingress(_program(network))
    assert missing.value.errno == 19
    bpf.verify_ingress(_program(network)).close()
