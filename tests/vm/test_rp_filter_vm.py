# SPDX-License-Identifier: Apache-2.0
"""The kernel's own check: off where it would drop clients, and exactly as strict as before everywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from tests.vm.conftest import Ground
from tests.vm.paths import Strike, hardware_address, strike
from tests.vm.test_matrix_vm import faults
from tools.lab import Network, vlan_cells
from tools.lab.netns import Namespace, remove
from tools.lab.topology import IpAddress

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.bpf]

#: Devices that no policy names: `stranger0` has rp_filter 0, and so on.
STRANGERS = range(3)
ELSEWHERE, NOWHERE = ip_address("203.0.113.77"), ip_address("100.64.0.1")
#: What gets through by the effective value, besides the device's own subnet.
ACCEPTED = {0: [ELSEWHERE, NOWHERE], 1: [], 2: [ELSEWHERE]}


@pytest.fixture(scope="module")
def strangers(ground: Ground) -> Iterator[Namespace]:
    node, far = ground.lab.node, Namespace(f"{ground.lab.prefix}strangers")
    far.create()
    try:
        # A default route leads everywhere else; in loose mode only this is nowhere.
        node.ip(["route add unreachable 100.64.0.0/10"])
        for number in STRANGERS:
            device = f"stranger{number}"
            node.ip(
                [
                    f"link add {device} type veth peer name {device} netns {far.name}",
                    f"link set {device} up",
                    f"addr add 10.7.{number}.1/24 dev {device}",
                ]
            )
            far.ip([f"link set {device} up", f"addr add 10.7.{number}.2/24 dev {device}"])
        yield far
    finally:
        # A namespace that is deleted takes its devices along some time later only.
        node.ip([f"link del stranger{number}" for number in STRANGERS])
        remove(far.name)
        node.ip(["route del unreachable 100.64.0.0/10"])


def passing(node: Namespace, far: Namespace) -> list[list[IpAddress]]:
    """Which of the two foreign sources gets through each stranger."""
    found = []
    for number in STRANGERS:
        device = f"stranger{number}"
        origin = Strike(far, device, hardware_address(node, device))
        sources = [ELSEWHERE, NOWHERE, ip_address(f"10.7.{number}.2")]
        found.append(strike(origin, (node, ip_address(f"10.7.{number}.1")), sources)[:-1])
    return found


def settings(node: Namespace) -> dict[str, str]:
    names = ("all", "default", "eth0", *(f"stranger{number}" for number in STRANGERS))
    return {name: node.read_sysctl(f"net/ipv4/conf/{name}/rp_filter") for name in names}


@pytest.fixture(params=[False, True], ids=["made-by-us", "given-with-address"])
def vlan(request: pytest.FixtureRequest, ground: Ground) -> Iterator[Network]:
    """The VLAN's device: made by the policy, or somebody else's, with addresses."""
    (network,) = ground.lab.networks
    if request.param:
        ground.lab.node.ip(
            [
                f"link add link eth0 name {network.device} type vlan id {network.vlan_id}",
                f"link set {network.device} up",
            ]
        )
        ground.lab.add_vlan_address(network)
    yield network
    if request.param:
        ground.lab.node.ip([f"link del {network.device}"])


@pytest.mark.parametrize(
    "everywhere",
    [
        0,
        pytest.param(1, marks=pytest.mark.one_kernel("6.1")),
        pytest.param(2, marks=pytest.mark.one_kernel("6.12")),
    ],
)
def test_clients_are_served_and_strangers_judged_as_before(
    ground: Ground, strangers: Namespace, vlan: Network, everywhere: int
) -> None:
    """Left out: 1 for `all` on 6.12, and 2 on 6.1. The strangers' own settings are 0, 1 and 2 in each run."""
    node = ground.lab.node
    node.sysctl(
        {"net/ipv4/conf/all/rp_filter": everywhere}
        | {f"net/ipv4/conf/stranger{number}/rp_filter": number for number in STRANGERS}
    )
    try:
        values = settings(node)
        before = passing(node, strangers)
        assert before == [ACCEPTED[max(everywhere, number)] for number in STRANGERS]
        ground.apply(ground.public())
        ground.lab.announce(vlan)
        cells = [cell for cell in vlan_cells(ground.lab.networks) if cell.client == "client"]
        assert faults(ground, cells) == []
        assert passing(node, strangers) == before
        ground.apply()
        assert settings(node) == values
        assert passing(node, strangers) == before
    except BaseException:
        ground.apply()
        raise
    finally:
        node.sysctl({"net/ipv4/conf/all/rp_filter": 0})
