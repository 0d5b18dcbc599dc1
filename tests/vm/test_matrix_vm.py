# SPDX-License-Identifier: Apache-2.0
"""Design section 3 on a real VLAN: the matrix, and what a spoofer on the VLAN gets, with the program on the trunk."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datapath.plan.ingress import Verdict
from tests.vm.conftest import Ground, addresses, increase
from tests.vm.paths import Strike, hardware_address, strike
from tools.lab import Backend, Way, elsewhere_cells, inside_cells, probe_all, vlan_cells
from tools.lab.cells import Cell
from tools.lab.dump import tcx_programs
from tools.lab.topology import FAMILIES

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.bpf]

# For both families; one more, a VIP, is added where they are used. Some would be dropped by the IP stack, too:
# the counters tell who did it.
SPOOFED = (
    ("10.112.1.2", "10.96.0.1", "192.168.1.10"),
    ("fd00:10:112:1::2", "fd00:10:96::1", "2001:db8:1::10"),
)
MARTIANS = (
    ("127.0.0.1", "224.0.0.1", "240.0.0.1", "0.0.0.1"),
    ("::1", "ff02::1", "::ffff:192.0.2.1", "::192.0.2.1"),
)
COUNTED = {Verdict.SPOOFED: 4, Verdict.MARTIAN: 4}


def faults(ground: Ground, cells: list[Cell], *, seconds: float = 1.5) -> list[str]:
    results = probe_all(ground.lab, cells, seconds=seconds)
    return [f"{r.cell}: {r.detail}" for r in results if not r.ok]


def test_without_policy_the_vlan_cells_fail(ground: Ground) -> None:
    (network,) = ground.lab.networks
    ground.lab.node.ip(
        [
            f"link add link eth0 name {network.device} type vlan id {network.vlan_id}",
            f"link set {network.device} up",
        ]
    )
    try:
        ground.lab.announce(network)
        cells = [cell for cell in vlan_cells(ground.lab.networks) if cell.client == "client"]
        results = probe_all(ground.lab, cells, seconds=0.4)
        assert [str(r.cell) for r in results if r.ok] == []
        assert {way for r in results for way in r.ways} == {Way.GATEWAY}
    finally:
        ground.lab.node.ip([f"link del {network.device}"])


@pytest.fixture(scope="module")
def served(ground: Ground) -> Iterator[Ground]:
    ground.apply(ground.public())
    ground.lab.announce(ground.lab.networks[0])
    yield ground
    ground.apply()


@pytest.mark.parametrize("group", [vlan_cells, inside_cells], ids=["by the VLAN", "from inside"])
def test_every_cell_holds(served: Ground, group: type) -> None:
    assert faults(served, group(served.lab.networks)) == []
    assert served.lab.by_gateway.wrong_way() == 0


def test_the_way_to_the_rest_of_the_world_stays(served: Ground) -> None:
    assert faults(served, elsewhere_cells()) == []


def test_the_program_is_on_the_trunk_alone(served: Ground) -> None:
    (network,) = served.lab.networks
    node = served.lab.node
    by_tcx = {line.split()[0] for line in node.call(tcx_programs).splitlines() if "datapath" in line}
    by_filter = {
        device
        for device in ("eth0", network.device)
        if "datapath" in node.run("tc", "filter", "show", "dev", device, "ingress")
    }
    assert "eth0" in by_tcx | by_filter
    assert network.device not in by_tcx | by_filter
    assert "vlan protocol 802.1Q id 100" in served.lab.node.run("ip", "-d", "link", "show", network.device)


@pytest.mark.parametrize("family", FAMILIES)
def test_forged_sources_are_dropped_by_reason(served: Ground, family: int) -> None:
    (network,) = served.lab.networks
    before = served.dropped(network.name)
    router = served.lab["router"]
    origin = Strike(router, "node", hardware_address(served.lab.node, network.device))
    vip = network.vips[Backend.HOST_VIP].get(family)
    forged = [*addresses(*SPOOFED[family == 6], *MARTIANS[family == 6]), vip]
    honest = network.client.get(family)

    assert strike(origin, (served.lab.node, vip), [*forged, honest]) == [honest]
    assert increase(before, served.dropped(network.name)) == COUNTED
