# SPDX-License-Identifier: Apache-2.0
"""Status tells what is not as the policy says, also what no apply can put right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.nodes import Node, node
from tests.service.daemon import wait_until

pytestmark = [pytest.mark.root, pytest.mark.bpf]

POLICY = """\
version: 1
backend: nft
networks:
  - {name: public, interface: eth1, vips: [198.51.100.0/24], gateway: 198.51.100.1}
"""


@pytest.fixture
def bare() -> Iterator[Node]:
    with node(4) as built:
        yield built


def test_a_device_that_is_down_is_drift(bare: Node, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    assert bare.datapath(tmp_path / "state", "apply", str(policy)).returncode == 0
    bare.namespace.ip(["link set eth1 down"])
    status = bare.datapath(tmp_path / "state", "status")
    assert status.returncode == 3, status.stdout
    assert "device eth1 is missing or down" in status.stdout
    bare.namespace.ip(["link set eth1 up"])
    assert bare.datapath(tmp_path / "state", "apply", str(policy)).returncode == 0
    assert bare.datapath(tmp_path / "state", "status").returncode == 0


def test_a_change_on_probation_says_so(bare: Node, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(POLICY)
    state = tmp_path / "state"
    assert bare.datapath(state, "apply", str(policy), "--confirm", "600").returncode == 0
    assert "goes back to no policy by itself" in bare.datapath(state, "status").stdout
    assert bare.datapath(state, "confirm").returncode == 0
    assert "by itself" not in bare.datapath(state, "status").stdout
    late = bare.datapath(state, "confirm")
    assert late.returncode == 1
    assert "nothing waits" in late.stderr


def test_an_unconfirmed_change_undoes_itself(bare: Node, tmp_path: Path) -> None:
    """The process that applied is gone by then; its guardian is not."""
    policy = tmp_path / "policy.yaml"
    state = tmp_path / "state"
    policy.write_text(POLICY)
    assert bare.datapath(state, "apply", str(policy)).returncode == 0
    before = bare.run("ip", "route", "show", "table", "700001")
    policy.write_text(POLICY.replace("198.51.100.1}", "198.51.100.9}"))
    assert bare.datapath(state, "apply", str(policy), "--confirm", "2").returncode == 0
    during = bare.run("ip", "route", "show", "table", "700001")
    # On a busy machine the two seconds may be over already.
    assert "198.51.100.9" in during or _is_undone(bare, state)
    wait_until(lambda: _is_undone(bare, state), "it goes back by itself")
    assert bare.run("ip", "route", "show", "table", "700001") == before
    assert bare.datapath(state, "status").returncode == 0


def _is_undone(bare: Node, state: Path) -> bool:
    return "generation 3" in bare.datapath(state, "history").stdout


def test_who_comes_to_a_table_of_ours_later_is_named_and_left_alone(bare: Node, tmp_path: Path) -> None:
    """Refused before an apply (`test_apply.py`); afterwards it is told, and nobody's route is taken away."""
    policy, state = tmp_path / "policy.yaml", tmp_path / "state"
    policy.write_text(POLICY)
    assert bare.datapath(state, "apply", str(policy)).returncode == 0
    assert "somebody else" not in bare.datapath(state, "status").stdout
    bare.namespace.ip(["route add 192.0.2.0/24 dev eth2 table 700001 proto bird"])
    bare.namespace.ip(["-6 rule add pref 500 from 2001:db8::/32 lookup 700001"])
    words = (
        "routing table 700001 of network public holds a route of somebody else (192.0.2.0/24 by bird)",
        "answers that it fits leave by it: delete that route, or pin `table` to a free one",
        "looks up routing table 700001, which is that of network public",
    )
    status = bare.datapath(state, "status")
    assert status.returncode == 0, "there is nothing that an apply would put right"
    assert all(text in status.stdout for text in words), status.stdout
    doctor = bare.datapath(state, "doctor").stdout
    assert "ok    conflict" not in doctor
    assert "no apply and no daemon takes it away" in doctor
    assert bare.datapath(state, "apply", str(policy)).returncode == 0
    assert "192.0.2.0/24" in bare.run("ip", "route", "show", "table", "700001")
    bare.namespace.ip(["route del 192.0.2.0/24 dev eth2 table 700001 proto bird"])
    bare.namespace.ip(["-6 rule del pref 500"])
    assert "somebody else" not in bare.datapath(state, "status").stdout
