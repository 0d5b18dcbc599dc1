# SPDX-License-Identifier: Apache-2.0
"""The matrix of design section 3 with `steering: direct`: every cell but one, which is shown to be as the pages say."""

from __future__ import annotations

from pathlib import Path

import pytest

from datapath.kernel.bpf import attachments
from datapath.plan.tc import Hook
from tests.netns.test_matrix import faults, run
from tools.lab import Dnat, Lab, Way, command, network, probe_all, vlan_cells
from tools.lab.dump import difference, dump_namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf]

DIRECT = "    steering: direct\n"
#: A client of eth0's own subnet behind the VLAN: it is looked for on eth0, before any program sees the answer.
NEVER_SEEN = "client_overlap"


@pytest.fixture(
    params=[
        pytest.param(Hook.TCX, marks=pytest.mark.kernel_feature("tcx")),
        pytest.param(Hook.CLSACT, marks=pytest.mark.kernel_feature("cls_bpf")),
    ]
)
def hook(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hook:
    monkeypatch.setenv(attachments.ENVIRONMENT, request.param)
    return Hook(request.param)


def test_every_cell_but_the_named_one_holds(hook: Hook, tmp_path: Path) -> None:
    dnat = Dnat.NFTABLES if hook is Hook.TCX else Dnat.IPTABLES_LEGACY
    with Lab(dnat=dnat, networks=[network(0), network(1)]) as lab:
        before = dump_namespace(lab.node)
        printed = command.apply(lab, tmp_path, lab.policy(network_extra=DIRECT))
        assert "clients in 192.168.1.0/24 are answered on eth0" in printed
        after = dump_namespace(lab.node)
        # No rule, no route, no mark, no table of ours.
        for section in ("rules4", "rules6", "routes4", "routes6", "nft"):
            assert after[section] == before[section]
        assert {way: after[way] != before[way] for way in ("tcx", "filters")} == {
            "tcx": hook is Hook.TCX,
            "filters": hook is Hook.CLSACT,
        }

        results = run(lab)
        served = [r for r in results if not r.cell.client.startswith(NEVER_SEEN)]
        assert len(results) - len(served) == 2 * 4 * 3 * 2
        assert faults(served) == []
        command.teardown(lab, tmp_path)
        assert difference(before, dump_namespace(lab.node)) == ""


def test_the_named_cell_is_as_without_a_policy(tmp_path: Path) -> None:
    with Lab(dnat=Dnat.NFTABLES) as lab:
        command.apply(lab, tmp_path, lab.policy(network_extra=DIRECT))
        overlap = [c for c in vlan_cells(lab.networks) if c.client == NEVER_SEEN]
        results = probe_all(lab, overlap, seconds=0.4)
        assert overlap
        assert not any(result.ok for result in results)
        assert Way.ROUTER not in {way for result in results for way in result.ways}
