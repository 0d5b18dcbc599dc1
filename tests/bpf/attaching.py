# SPDX-License-Identifier: Apache-2.0
"""The ingress program of a few networks on real devices: attached as the controller does it, and looked at."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING

import pytest

from datapath.kernel import bpf, tc
from datapath.kernel.bpf import attachments, tcx
from datapath.plan.ingress import IngressNetwork, IngressPoint, IngressProgram, Verdict, VlanProtocol
from datapath.plan.tc import Direction, Hook
from tests.bpf.conftest import run
from tests.bpf.packets import frame, ipv4, ipv6

if TYPE_CHECKING:
    from tests.bpf.packets import Tag

MASK = 0xFF00
VLAN = IngressNetwork(
    name="vlan", slot=1, fwmark=0x100, point=IngressPoint("trunk0", VlanProtocol.DOT1Q, 100), device="trunk0"
)
UNTAGGED = IngressNetwork(name="flat", slot=2, fwmark=0x200, point=IngressPoint("trunk0"), device="trunk0")
OTHER_DEVICE = IngressNetwork(
    name="other", slot=3, fwmark=0x300, point=IngressPoint("trunk1"), device="trunk1"
)
V4 = ipv4("192.0.2.1", "198.51.100.1")
V6 = ipv6("2001:db8::1", "2001:db8:1::1")


def use_hook(monkeypatch: pytest.MonkeyPatch, hook: Hook) -> None:
    monkeypatch.setenv(attachments.ENVIRONMENT, hook)
    assert attachments.preferred_hook() is hook


def program(*networks: IngressNetwork) -> IngressProgram:
    return IngressProgram(fwmark_mask=MASK, networks=networks)


def apply(desired: IngressProgram) -> dict[str, bool]:
    """The controller's part in short; which devices got a clsact from us."""
    actual = bpf.observe_ingress()
    diff = bpf.compare_ingress(desired, actual)
    if diff.reload:
        with bpf.load_ingress(desired) as loaded:
            bpf.switch(loaded, actual, diff.attach)
    else:
        if diff.update is not None:
            bpf.update_entries(diff.update, desired)
        if diff.attach:
            with bpf.LoadedIngress.open(next(iter(actual.programs))) as loaded:
                for name in diff.attach:
                    bpf.attach(loaded, name)
    created = {name: name in bpf.observe_ingress().clsact - actual.clsact for name in diff.attach}
    for name in diff.detach:
        bpf.detach(name)
    tc.remove_clsact(*diff.detach)
    assert bpf.compare_ingress(desired, bpf.observe_ingress()).is_empty
    return created


def packets(slot: int) -> int:
    state = bpf.observe_ingress()
    (program_id,) = state.programs
    counters = bpf.read_counters(program_id)
    return counters[slot][Verdict.PASS].packets if slot in counters else 0


def nft_counts() -> dict[str, int]:
    listing = run("nft", "list", "table", "netdev", "probe")
    return {name: int(count) for count, name in re.findall(r'packets (\d+) .*comment "(\w+)"', listing)}


def tagged(ethertype: int, payload: bytes, tag: Tag) -> bytes:
    return frame(ethertype, payload, (tag,))


def chain(device: str) -> tuple[int, ...]:
    """Ids of the tcx programs at the device's ingress."""
    return tcx.programs(socket.if_nametoindex(device), Direction.INGRESS) if tcx.is_supported() else ()


def dump(*devices: str) -> str:
    shown = [run("tc", "qdisc", "show"), *(f"{device}: {chain(device)}" for device in devices)]
    for device in devices:
        shown += [run("tc", "filter", "show", "dev", device, hook) for hook in ("ingress", "egress")]
    return "".join(shown)


def add_classic(device: str, hook: str, *, priority: int) -> None:
    """A filter of someone else: classic BPF, which needs no other kernel module than ours does."""
    filter_ = ["tc", "filter", "add", "dev", device, hook, "pref", str(priority), "handle", hex(tc.TC_HANDLE)]
    run(*filter_, "bpf", "bytecode", "1,6 0 0 0,", "flowid", "1:1")
