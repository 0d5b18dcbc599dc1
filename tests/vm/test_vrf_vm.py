# SPDX-License-Identifier: Apache-2.0
"""Networks in VRFs: the whole matrix, what may be reached from a VRF and what not, what others do to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from datapath.errors import ConflictError
from datapath.observe.status import make_status
from tests.vm.conftest import Ground
from tests.vm.test_matrix_vm import faults
from tests.vm.vrf import BLUE, RED, TABLES, UNCHECKED, Place, client_of_blue, client_of_red, leaking, outside
from tools.lab import elsewhere_cells, inside_cells, vlan_cells
from tools.lab.topology import FAMILIES

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


@pytest.mark.timeout(600)
def test_nothing_leads_out_of_a_vrf_but_what_the_policy_names(served: Ground) -> None:
    """Tried from each of two VRFs: into the other one, and to where main leads; and seen where a rule leaks.

    Services are the node's: a VIP of one network is answered to a client of another one, by the VRF that he is in.
    """
    served.apply(served.public() + RED + UNCHECKED, served.paths["given"].policy + BLUE + UNCHECKED)
    red, blue = client_of_red(served), client_of_blue(served)
    for client, other in ((red, blue), (blue, red)):
        places = outside(served) | {"the other VRF": other.place}
        tables = {"world": "main", "node's own network": "main", "the other VRF": str(TABLES[other.vrf])}
        with client.sending([place.addresses for place in places.values()]):
            for family in FAMILIES:
                assert client.arrives(places, family, {"pod"}) == {"pod"}, (client.vrf, family)
                leaks = {places[name].addresses.get(family): table for name, table in tables.items()}
                with leaking(served, leaks):
                    found = client.arrives(places, family, set(places))
                assert found == set(places), (client.vrf, family)
    for family in FAMILIES:
        assert red.is_answered(Place(served.lab.node, served.paths["given"].vip), family)
    _again(served)


def told(ground: Ground) -> str:
    """What `datapath status` prints."""
    drift = ground.status()
    return make_status(drift.plan, drift.state, drift.steps, drift.waiting, {}, actual=drift.actual).render()


def test_a_deleted_vrf_is_made_again(served: Ground) -> None:
    path = served.paths["given"]
    served.lab.node.ip(["link del blue"])
    assert "add VRF blue (table 3)" in told(served)
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
        assert f"device {path.device} belongs to VRF black, the policy wants blue: take it out" in told(
            served
        )
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
