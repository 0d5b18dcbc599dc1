# SPDX-License-Identifier: Apache-2.0
"""`accelerate` on the kernel at hand: a person is refused where it has no flowtables, and a daemon serves the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.controller import Controller
from datapath.kernel.flowtables import why_no_flowtables
from datapath.policy import parse_policy
from datapath.state import StateDirectory
from tests.kernel_features import kernel_has
from tests.netns.nodes import Node, inside, node

pytestmark = [pytest.mark.root, pytest.mark.bpf]

POLICY = """\
version: 1
backend: nft
networks:
  - name: public
    interface: eth1
    vips: [198.51.100.0/24]
    gateway: 198.51.100.1
    accelerate: true
"""


@pytest.fixture
def bare() -> Iterator[Node]:
    with node(4) as built:
        yield built


@pytest.mark.vm
def test_the_probe_says_what_the_kernel_can_do() -> None:
    assert (why_no_flowtables() == "") is kernel_has("nf_flow_table")


def test_a_person_is_told_and_nothing_changes(bare: Node, tmp_path: Path) -> None:
    policy, state = tmp_path / "policy.yaml", tmp_path / "state"
    policy.write_text(POLICY)
    done = bare.datapath(state, "apply", str(policy))
    table = bare.run("nft", "list", "ruleset")
    if kernel_has("nf_flow_table"):
        assert done.returncode == 0, done.stderr
        assert "flow add @fast" in table
        assert bare.datapath(state, "status").returncode == 0
        assert bare.datapath(state, "teardown").returncode == 0
        assert not bare.run("nft", "list", "ruleset")
        return
    assert done.returncode == 2, done.stderr
    assert f"{policy}:8:17: error: networks[0].accelerate: this kernel has no flowtables" in done.stderr
    assert "hint: load nf_flow_table" in done.stderr
    assert not table


@pytest.mark.vm
def test_a_daemon_serves_what_the_kernel_can_do(bare: Node, tmp_path: Path) -> None:
    """A node that boots an older kernel must not lose its networks over what only makes them faster."""
    directory = StateDirectory(tmp_path / "state")
    with inside(bare.namespace.name):
        applied = Controller(directory, wait_for_devices=True).apply(
            parse_policy(POLICY.encode(), "policy.yaml")
        )
        drift = Controller(directory).status()
    assert drift is not None
    assert not drift.steps
    able = kernel_has("nf_flow_table")
    assert ("flow add @" in bare.run("nft", "list", "ruleset")) is able
    assert any("connections go the usual way" in note.text for note in applied.plan.notes) is not able
    assert "table 700001" in bare.run("ip", "route", "show", "table", "all")
