# SPDX-License-Identifier: Apache-2.0
"""`isolate_clients`: clients with the same address and port, on several networks at once, to the same VIPs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.netns.crowd import crowd, unserved
from tests.netns.equals import ISOLATED, overlapping
from tools.lab import (
    Cell,
    Lab,
    command,
    elsewhere_cells,
    inside_cells,
    probe_all,
    same_ports,
    vlan_cells,
)
from tools.lab.dump import difference, dump_namespace
from tools.lab.topology import FAMILIES, VIP_BACKENDS

pytestmark = [pytest.mark.root, pytest.mark.bpf]

NETWORKS = 4
#: By backend: what tells networks apart is the same with both.
CLIENTS = {"ebpf": 200, "nft": 50}


def faults(lab: Lab, cells: list[Cell]) -> list[str]:
    return [f"{r.cell}: {r.detail}" for r in probe_all(lab, cells) if not r.ok]


@pytest.mark.parametrize("backend", ["ebpf", "nft"])
def test_every_cell_holds_and_teardown_leaves_nothing(tmp_path: Path, backend: str) -> None:
    with Lab(networks=overlapping()) as lab:
        before = dump_namespace(lab.node)
        command.apply(lab, tmp_path, lab.policy(extra=f"backend: {backend}\n", network_extra=ISOLATED))

        assert faults(lab, same_ports(vlan_cells(lab.networks))) == []
        assert faults(lab, inside_cells(lab.networks[:1])) == []
        assert faults(lab, elsewhere_cells()) == []
        assert lab.wrong_way() == 0
        command.teardown(lab, tmp_path)
        assert difference(before, dump_namespace(lab.node)) == ""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ebpf", "nft"])
def test_a_crowd_of_equal_clients_on_four_networks_at_once(tmp_path: Path, backend: str) -> None:
    with Lab(networks=overlapping(NETWORKS)) as lab, crowd(lab, CLIENTS[backend]):
        command.apply(lab, tmp_path, lab.policy(extra=f"backend: {backend}\n", network_extra=ISOLATED))
        failed = {
            (target, version): unserved(lab, target, version, CLIENTS[backend])
            for target in VIP_BACKENDS
            for version in FAMILIES
        }
        assert {key: names[:5] for key, names in failed.items() if names} == {}
        assert lab.wrong_way() == 0
