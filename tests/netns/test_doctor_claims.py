# SPDX-License-Identifier: Apache-2.0
"""What `datapath doctor` says about src_valid_mark is what happens to traffic."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.lab import Lab, command, probe_all, vlan_cells
from tools.lab.cells import Cell, Proto

pytestmark = [pytest.mark.root, pytest.mark.bpf]


def _served(lab: Lab) -> dict[str, bool]:
    """By cell, for IPv4 and TCP: IPv6 has no rp_filter."""
    cells: list[Cell] = [
        cell
        for cell in vlan_cells(lab.networks)
        if cell.client == "client" and cell.proto is Proto.TCP and cell.family == 4
    ]
    return {str(result.cell): result.ok for result in probe_all(lab, cells)}


@pytest.mark.parametrize("rp_filter", [1, 2])
def test_src_valid_mark_drops_replies_of_pods_where_rp_filter_is_strict(
    served: Lab, state: Path, rp_filter: int
) -> None:
    devices = [link for link in served.node.run("ls", "/proc/sys/net/ipv4/conf").split() if link != "all"]
    ours = {network.device for network in served.networks}
    keys = [f"net/ipv4/conf/{name}/rp_filter" for name in devices if name not in ours]
    before = {key: served.node.read_sysctl(key) for key in keys}
    assert all(_served(served).values())
    try:
        served.node.sysctl(dict.fromkeys(keys, rp_filter))
        served.node.sysctl({"net/ipv4/conf/all/src_valid_mark": 1})
        works = _served(served)
        said = command.datapath(served, state, "doctor").stdout
    finally:
        served.node.sysctl({"net/ipv4/conf/all/src_valid_mark": 0})
        served.node.sysctl(before)
    assert (not all(works.values())) == (rp_filter == 1), works
    assert ("fail  src_valid_mark" in said) == (rp_filter == 1), said
