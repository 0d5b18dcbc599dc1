# SPDX-License-Identifier: Apache-2.0
"""Networks in VRFs: the whole matrix, what may be reached from a VRF and what not, what others do to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datapath.errors import ConflictError
from tests.vm.conftest import Ground
from tests.vm.test_matrix_vm import faults
from tests.vm.vrf import BLUE, RED, UNCHECKED, reaches, sent_to_the_node
from tools.lab import elsewhere_cells, inside_cells, vlan_cells
from tools.lab.topology import ELSEWHERE, FAMILIES, GW, POD_A

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.bpf,
    *(pytest.mark.kernel_feature(name) for name in ("8021q", "vrf")),
]


@pytest.fixture(scope="module")
def served(ground: Ground) -> Iterator[Ground]:
    ground.apply(ground.public() + RED, ground.paths["given"].policy + BLUE + UNCHECKED)
    ground.lab.announce(ground.lab.networks[0])
    yield ground
    ground.apply()


@pytest.mark.parametrize("group", [vlan_cells, inside_cells], ids=["by the VRF", "from inside"])
def test_every_cell_holds(served: Ground, group: type) -> None:
    assert faults(served, group(served.lab.networks)) == []
    assert served.lab.by_gateway.wrong_way() == 0


def test_the_way_to_the_rest_of_the_world_stays(served: Ground) -> None:
    assert faults(served, elsewhere_cells()) == []


def test_a_given_device_serves_in_a_vrf(served: Ground) -> None:
    path = served.paths["given"]
    assert [path.is_served(family) for family in FAMILIES] == [True, True]
    assert not served.status().steps


#: Where a client of `blue` may try to get to: namespace and address.
OUTSIDE = {
    "the world": ("gw", ELSEWHERE),
    "the node's own network": ("gw", GW),
    "a client of red": ("client", None),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_leads_out_of_a_vrf_but_what_the_policy_names(served: Ground, family: int) -> None:
    (network,) = served.lab.networks
    places = [(role, address or network.client) for role, address in OUTSIDE.values()]
    with sent_to_the_node(served.paths["given"], [POD_A, *(address for _, address in places)]):
        assert reaches(served, "pod_a", POD_A, family)
        assert [reaches(served, role, address, family) for role, address in places] == [False] * len(places)


def test_a_deleted_vrf_is_made_again(served: Ground) -> None:
    path = served.paths["given"]
    served.lab.node.ip(["link del blue"])
    assert served.status().steps
    look = served.heal()
    assert (look.failed, look.held, look.waiting, look.conflicts) == ((), (), (), ())
    assert not served.status().steps
    assert [path.is_served(family) for family in FAMILIES] == [True, True]


def test_a_device_that_was_taken_out_is_put_back(served: Ground) -> None:
    path = served.paths["given"]
    served.lab.node.ip([f"link set {path.device} nomaster"])
    assert next(step.describe() for step in served.status().steps) == f"put {path.device} into VRF blue"
    _again(served)
    assert [path.is_served(family) for family in FAMILIES] == [True, True]


def test_a_device_in_another_vrf_is_left_there(served: Ground) -> None:
    path = served.paths["given"]
    served.lab.node.ip(
        ["link add black type vrf table 77", "link set black up", f"link set {path.device} master black"]
    )
    try:
        assert path.device in served.status().waiting
        look = served.heal()
        assert (look.done, look.waiting) == ((), (path.name,))
        assert [text for text in look.conflicts if f"{path.device} belongs to VRF black" in text]
        with pytest.raises(ConflictError, match=f"{path.device} belongs to VRF black"):
            _again(served)
    finally:
        served.lab.node.ip(["link del black"])
    _again(served)
    assert path.is_served(4)


def _again(ground: Ground) -> None:
    ground.apply(ground.public() + RED, ground.paths["given"].policy + BLUE + UNCHECKED)
    assert not ground.status().steps
