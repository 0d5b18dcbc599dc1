# SPDX-License-Identifier: Apache-2.0
"""Equal clients on two VLANs of one trunk: what the kernel does about their fragments, ports and sockets.

Left out: all cells on 6.12, and all cells in VRFs on 6.1. What the cells are made of is shown on both: zones by the
other tests here, VRFs by tests/vm/test_vrf_vm.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from datapath.controller import Controller
from datapath.policy import parse_policy
from datapath.reconcile.steps import MoveConnections
from datapath.state import StateDirectory
from tests.bpf.conftest import inside
from tests.netns.equals import ISOLATED, both, datagrams_in_fragments, each, in_vrfs, overlapping
from tools.lab import Lab, Proto, probe_all, same_ports, vlan_cells
from tools.lab.topology import FAMILIES, VIP_BACKENDS
from tools.lab.traffic import ask_line

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.kernel_feature("8021q")]


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Lab, Controller]]:
    with Lab(networks=overlapping(), vlan="8021q") as lab:
        controller = Controller(StateDirectory(tmp_path_factory.mktemp("state")))
        # Emulated, one more eBPF program costs most of a minute; it has no part in this.
        text = lab.policy(extra="backend: nft\n", network_extra=ISOLATED)
        with inside(lab.node.name):
            controller.apply(parse_policy(text.encode(), "vm.yaml"))
        for network in lab.networks:
            lab.announce(network)
        yield lab, controller


def served_equals(lab: Lab) -> None:
    """Both outside clients ask everything from the same ports."""
    cells = [cell for cell in same_ports(vlan_cells(lab.networks)) if cell.client in {"client", "client2"}]
    # Emulated, looking for all neighbours at once takes longer than they are looked for.
    probe_all(lab, [replace(cell, source_port=0) for cell in cells if cell.proto is Proto.ICMP], seconds=3)
    results = probe_all(lab, cells, seconds=1.5)
    assert [f"{r.cell}: {r.detail}" for r in results if not r.ok] == []
    assert lab.wrong_way() == 0


@pytest.mark.one_kernel("6.1")
def test_every_cell_of_equal_clients_holds(isolated: tuple[Lab, Controller]) -> None:
    served_equals(isolated[0])


@pytest.mark.kernel_feature("vrf")
@pytest.mark.one_kernel("6.12")
def test_every_cell_of_equal_clients_holds_in_vrfs(tmp_path: Path) -> None:
    """Hooks run twice there; the pass that has the network's own device decides on the zone."""
    with Lab(networks=overlapping(), vlan="8021q") as lab:
        text = in_vrfs(lab.policy(extra="backend: nft\n", network_extra=ISOLATED))
        with inside(lab.node.name):
            Controller(StateDirectory(tmp_path)).apply(parse_policy(text.encode(), "vrfs.yaml"))
        for network in lab.networks:
            lab.announce(network)
        served_equals(lab)
        zones = {entry.split("zone-orig=")[1].split()[0] for entry in tracked(lab) if "zone-orig=" in entry}
        assert zones == {"40001", "40002"}


def tracked(lab: Lab) -> list[str]:
    text = lab.node.run("cat", "/proc/thread-self/net/nf_conntrack")
    return [line for line in text.splitlines() if "dst=1.2.3." in line]


@pytest.mark.parametrize("version", FAMILIES)
def test_fragments_are_not_mixed(isolated: tuple[Lab, Controller], version: int) -> None:
    assert datagrams_in_fragments(isolated[0], version) == {b"A" * 2000, b"B" * 2000}


def test_open_connections_of_equal_clients_move(isolated: tuple[Lab, Controller]) -> None:
    lab, controller = isolated
    policy = lab.policy(extra="backend: nft\n", network_extra=ISOLATED)
    moved = each(policy, "    zone: 7\n", "    zone: 8\n")
    with ExitStack() as stack:
        socks = [
            sock
            for number, backend in enumerate(VIP_BACKENDS)
            for version in FAMILIES
            for sock in stack.enter_context(
                both(lab, lab.networks[0].vips[backend].get(version), 43000 + number)
            )
        ]
        known = [ask_line(sock, "who") for sock in socks]
        with inside(lab.node.name):
            steps = controller.apply(parse_policy(moved.encode(), "vm.yaml")).steps
        assert [step.change.new for step in steps if isinstance(step, MoveConnections)] == [7, 8]
        assert [ask_line(sock, "who") for sock in socks] == known
    assert lab.wrong_way() == 0
