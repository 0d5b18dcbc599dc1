# SPDX-License-Identifier: Apache-2.0
"""Design section 3, cell by cell: who may ask a VIP, and by which way the answer leaves the node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.lab import (
    Dnat,
    Lab,
    ProbeResult,
    RpFilter,
    Way,
    command,
    elsewhere_cells,
    inside_cells,
    network,
    probe_all,
    vlan_cells,
)
from tools.lab.dump import difference, dump_namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf]


def run(lab: Lab, *, by_vlan_seconds: float = 1.0) -> list[ProbeResult]:
    """Run the whole matrix, in three batches so that what leaves inside can be told from what came by the VLAN."""
    groups = (
        (vlan_cells(lab.networks), by_vlan_seconds),
        (inside_cells(lab.networks), 1.0),
        (elsewhere_cells(), 1.0),
    )
    return [result for cells, seconds in groups for result in probe_all(lab, cells, seconds=seconds)]


def faults(results: list[ProbeResult]) -> list[str]:
    return [f"{r.cell}: {r.detail}" for r in results if not r.ok]


def test_cells_differ_from_each_other() -> None:
    cells = vlan_cells([network()]) + inside_cells([network()]) + elsewhere_cells()

    assert max(Counter(cells).values()) == 1
    assert len(cells) == 3 * 4 * 3 * 2 + 4 * 4 * 3 * 2 + 3 * 3 * 2


def test_without_policy_the_vlan_cells_fail_and_the_others_work(any_dnat_lab: Lab) -> None:
    results = run(any_dnat_lab, by_vlan_seconds=0.4)

    by_vlan = [r for r in results if r.cell.expect in (Way.ROUTER, Way.ON_LINK)]
    others = [r for r in results if r.cell.expect in (Way.INSIDE, Way.GATEWAY)]
    assert [str(r.cell) for r in by_vlan if r.ok] == []
    assert {way for r in by_vlan for way in r.ways} == {Way.GATEWAY}
    assert faults(others) == []


def test_with_policy_every_cell_holds_and_teardown_leaves_nothing(any_dnat_lab: Lab, tmp_path: Path) -> None:
    before = dump_namespace(any_dnat_lab.node)
    command.apply(any_dnat_lab, tmp_path, any_dnat_lab.policy())
    try:
        assert faults(run(any_dnat_lab)) == []
        assert any_dnat_lab.by_gateway.wrong_way() == 0
    finally:
        command.teardown(any_dnat_lab, tmp_path)
    assert difference(before, dump_namespace(any_dnat_lab.node)) == ""


@pytest.fixture(
    params=[
        pytest.param(RpFilter(all=1, default=1), id="strict-everywhere"),
        pytest.param(RpFilter(all=2, default=2), id="loose-everywhere"),
        pytest.param(RpFilter(all=0, default=2, devices={"eth0": 1}), id="strict-on-eth0"),
    ]
)
def filtering_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with Lab(dnat=Dnat.NFTABLES, rp_filter=request.param) as built:
        yield built


def test_every_cell_holds_whatever_rp_filter_was(filtering_lab: Lab, tmp_path: Path) -> None:
    before = dump_namespace(filtering_lab.node)
    command.apply(filtering_lab, tmp_path, filtering_lab.policy())

    assert faults(run(filtering_lab)) == []
    command.teardown(filtering_lab, tmp_path)
    assert difference(before, dump_namespace(filtering_lab.node)) == ""


def test_every_cell_holds_with_an_address_on_the_vlan_device(tmp_path: Path) -> None:
    with Lab(vlan_address=True) as lab:
        command.apply(lab, tmp_path, lab.policy())

        assert faults(run(lab)) == []
