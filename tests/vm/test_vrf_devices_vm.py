# SPDX-License-Identifier: Apache-2.0
"""VRFs that come and go around a device: made, given, somebody else's, in the way; and what is given back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from datapath.errors import ConflictError
from tests.vm.conftest import Ground
from tests.vm.test_matrix_vm import faults
from tests.vm.vrf import BLUE, GIVEN, RED, UNCHECKED, client_of_blue, outside
from tools.lab import vlan_cells
from tools.lab.dump import difference
from tools.lab.topology import FAMILIES

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.bpf,
    *(pytest.mark.kernel_feature(name) for name in ("8021q", "vrf")),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_route_is_what_keeps_a_vrf_without_default_route_closed(ground: Ground, family: int) -> None:
    path = ground.paths["given"]
    policy = "".join(line for line in path.policy.splitlines(keepends=True) if "gateway" not in line)
    ground.apply(policy + BLUE + UNCHECKED)
    client, places = client_of_blue(ground), outside(ground)
    with client.sending([place.addresses for place in places.values()]):
        closed = client.arrives(places, family, {"pod"})
        ground.lab.node.ip([f"-{family} route del unreachable default table 3"])
        opened = client.arrives(places, family, set(places))
    ground.apply()
    assert (closed, opened) == ({"pod"}, set(places))


@pytest.mark.one_kernel("6.1")
def test_the_matrix_by_nftables(ground: Ground) -> None:
    """Left out on 6.12: nftables marks there as it does outside of VRFs, and VRFs route as they do with eBPF."""
    ground.apply(ground.public() + RED, top="backend: nft\n")
    ground.lab.announce(ground.lab.networks[0])
    assert faults(ground, vlan_cells(ground.lab.networks)) == []
    ground.apply()


@contextlib.contextmanager
def links(ground: Ground, *lines: str) -> Iterator[None]:
    """Devices of others, for a while; the first word of each is the name."""
    ground.lab.node.ip([f"link add {line}" for line in lines])
    try:
        yield
    finally:
        ground.lab.node.ip([f"link del {line.split()[0]}" for line in lines])


def test_a_table_of_somebody_else_is_refused(ground: Ground) -> None:
    path = ground.paths["given"]
    with (
        links(ground, "theirs type vrf table 3"),
        pytest.raises(ConflictError, match="table 3 is that of VRF theirs"),
    ):
        ground.apply(path.policy + BLUE)
    with links(ground, "blue type vrf table 4"), pytest.raises(ConflictError, match="blue has table 4"):
        ground.apply(path.policy + BLUE)
    ground.lab.node.ip(["route add 192.0.2.0/24 dev eth0 table 3"])
    try:
        with pytest.raises(ConflictError, match="table 3 holds a route of somebody else"):
            ground.apply(path.policy + BLUE)
    finally:
        ground.lab.node.ip(["route del 192.0.2.0/24 dev eth0 table 3"])
    with pytest.raises(ConflictError, match="there is no VRF blue"):
        ground.apply(path.policy + GIVEN)


def test_a_device_that_others_route_by_is_refused(ground: Ground) -> None:
    path = ground.paths["given"]
    ground.lab.node.ip([f"route add 192.0.2.0/24 dev {path.device}"])
    try:
        with pytest.raises(ConflictError, match=r"would lose the main table's route to 192.0.2.0/24"):
            ground.apply(path.policy + BLUE)
    finally:
        ground.lab.node.ip([f"route del 192.0.2.0/24 dev {path.device}"])


def test_a_vrf_of_others_is_used_and_left_and_addresses_come_back(ground: Ground) -> None:
    path, node = ground.paths["given"], ground.lab.node
    addresses = ("192.0.2.9/24", "2001:db8:9::9/64")
    with links(ground, "blue type vrf table 3"):
        node.ip(["link set blue up", *(f"addr add {address} dev {path.device}" for address in addresses)])
        try:
            before = ground.dump()
            ground.apply(path.policy + GIVEN)
            assert [path.is_served(family) for family in FAMILIES] == [True, True]
            assert "192.0.2.0/24" in node.run("ip", "route", "show", "table", "3")
            assert "192.0.2.0/24" not in node.run("ip", "route", "show")
            ground.apply()
            assert difference(before, ground.dump()) == ""
        finally:
            node.ip([f"addr del {address} dev {path.device}" for address in addresses])
