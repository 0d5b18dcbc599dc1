# SPDX-License-Identifier: Apache-2.0
"""A network on each kind of device: served, checked, made and removed, lost and found again."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from datapath.errors import ConflictError
from datapath.plan.ingress import Verdict
from tests.vm.conftest import Ground, addresses, increase
from tests.vm.paths import Path
from tests.vm.test_matrix_vm import COUNTED, MARTIANS, SPOOFED
from tools.lab.dump import difference
from tools.lab.patience import PATIENCE
from tools.lab.topology import FAMILIES

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.bpf,
    *(pytest.mark.kernel_feature(name) for name in ("8021q", "bonding", "bridge", "macvlan")),
]

KINDS = ["bond", "given", "bridge", "bridge-vlan", "macvlan", "qinq"]
MADE = ("bond0.300", "br1.500", "inner")
GIVEN = ("trunk1.400", "br0", "mac0")


def index(path: Path) -> int:
    return path.node.call(lambda: socket.if_nametoindex(path.device))


def names(ground: Ground) -> set[str]:
    return ground.lab.node.call(lambda: {name for _, name in socket.if_nameindex()})


def test_without_policy_replies_do_not_come_back(ground: Ground) -> None:
    assert not ground.paths["given"].is_served(4, attempts=1)


class Everything:
    """All kinds in one policy.

    Attributes:
        settled: the node's state before it.
    """

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.settled = ground.dump()

    def apply(self) -> None:
        self.ground.apply(*(path.policy for path in self.ground.paths.values()))


@pytest.fixture(scope="module")
def everything(ground: Ground) -> Iterator[Everything]:
    made = Everything(ground)
    made.apply()
    yield made
    ground.apply()


@pytest.mark.parametrize("kind", KINDS)
def test_requests_are_answered_by_the_way_they_came(everything: Everything, kind: str) -> None:
    path = everything.ground.paths[kind]
    assert [path.is_served(family) for family in FAMILIES] == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_forged_sources_are_dropped_by_reason(everything: Everything, kind: str) -> None:
    path = everything.ground.paths[kind]
    other = everything.ground.paths["bridge" if kind != "bridge" else "bond"]
    for family in FAMILIES:
        own = addresses(*SPOOFED[family == 6], *MARTIANS[family == 6])
        before = everything.ground.dropped(path.name)
        assert path.arrived([*own, other.vip.get(family)]) == []
        assert increase(before, everything.ground.dropped(path.name)) == COUNTED


def test_a_bond_that_changes_its_slave_is_served(everything: Everything) -> None:
    path = everything.ground.paths["bond"]
    path.node.ip(["link set slave0 down"])
    try:
        _wait_for_slave(path, "slave1")
        assert [path.is_served(family) for family in FAMILIES] == [True, True]
    finally:
        path.node.ip(["link set slave0 up"])
        _wait_for_slave(path, "slave0")


def _wait_for_slave(path: Path, name: str) -> None:
    end = time.monotonic() + 5 * PATIENCE
    for namespace in (path.node, path.far):
        while f"active_slave {name}" not in namespace.run("ip", "-d", "link", "show", "bond0"):
            assert time.monotonic() < end, f"{name} does not become the active one"
            time.sleep(0.1)


def test_a_lost_device_of_ours_is_made_again(everything: Everything) -> None:
    path = everything.ground.paths["qinq"]
    before = index(path)
    path.node.ip([f"link del {path.device}"])
    assert everything.ground.status().steps
    everything.apply()
    assert index(path) != before
    assert not everything.ground.status().steps
    assert [path.is_served(family) for family in FAMILIES] == [True, True]


def test_a_lost_device_of_others_is_waited_for(everything: Everything) -> None:
    path = everything.ground.paths["given"]
    before = index(path)
    path.node.ip([f"link del {path.device}"])
    with pytest.raises(ConflictError, match=path.device):
        everything.apply()
    add = f"link add link trunk1 name {path.device}"
    path.node.ip([f"{add} type vlan id 400", f"link set {path.device} up"])
    assert index(path) != before
    assert everything.ground.status().steps
    everything.apply()
    assert not everything.ground.status().steps
    assert [path.is_served(family) for family in FAMILIES] == [True, True]
    counted = everything.ground.dropped(path.name)
    assert path.arrived(addresses("10.112.1.2")) == []
    assert increase(counted, everything.ground.dropped(path.name)) == {Verdict.SPOOFED: 1}
    # The last comparison of the whole boot is with the first state, ifindex included.
    path.node.ip(
        [f"link del {path.device}", f"{add} index {before} type vlan id 400", f"link set {path.device} up"]
    )
    everything.apply()


@pytest.mark.parametrize(("port", "master"), [("port0", "br0"), ("slave0", "bond0")])
def test_a_port_is_refused_and_its_master_named(ground: Ground, port: str, master: str) -> None:
    path = ground.paths["bridge"]
    with pytest.raises(ConflictError, match=f"{port} is a port of {master}"):
        ground.apply(path.policy.replace(path.place, f"interface: {port}"))


def test_made_devices_go_and_given_ones_stay(ground: Ground) -> None:
    ground.apply()
    made = Everything(ground)
    made.apply()
    assert names(ground) >= {*MADE, *GIVEN}
    ground.apply()
    assert not names(ground) & set(MADE)
    assert names(ground) >= set(GIVEN)
    assert difference(made.settled, ground.dump()) == ""
