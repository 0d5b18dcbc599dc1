# SPDX-License-Identifier: Apache-2.0
"""FRR on a real VLAN in a real VRF: it announces the VIPs there, and the VRF's table is what it learns.

Left out on 6.1: what FRR does to a VRF is to write routes, and VRFs with their routes are shown there, too
(tests/vm/test_vrf_vm.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.vm.conftest import Ground
from tests.vm.test_matrix_vm import faults
from tools.lab import Way, vlan_cells
from tools.lab.bgp import Frr, Speaker
from tools.lab.topology import FAMILIES, pair

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.timeout(600),
    pytest.mark.one_kernel("6.12"),
    *(pytest.mark.kernel_feature(name) for name in ("8021q", "vrf")),
]

VRF, TABLE = "red", 2
NODE = pair("1.2.3.9", "2001:db8:100::9")


@dataclass(frozen=True)
class Peers:
    """The node with its policy, and both speakers."""

    ground: Ground
    node: Frr
    router: Frr

    def established(self) -> None:
        """Wait until both sessions are up, and each side has installed what it learned."""
        (network,) = self.ground.lab.networks
        for family in FAMILIES:
            self.node.wait_established(str(network.gateway.get(family)))
            vips = {str(vips.get(family)) for vips in network.vips.values()}
            self.node.wait(lambda f=family: "default" in self.learned("node", f), "a default route")  # type: ignore[misc]
            self.router.wait(lambda f=family, v=vips: self.learned("router", f) >= v, "the VIPs")  # type: ignore[misc]

    def learned(self, role: str, family: int) -> set[str]:
        """Destinations of BGP's routes; on the node, those in the table of the VRF."""
        selector = ["vrf", VRF] if role == "node" else []
        text = self.ground.lab[role].run("ip", f"-{family}", "-j", "route", "show", *selector, "proto", "bgp")
        return {route["dst"] for route in json.loads(text or "[]")}


@pytest.fixture(scope="module")
def peers(ground: Ground) -> Iterator[Peers]:
    (network,) = ground.lab.networks
    gateway = f'    gateway: ["{network.gateway.v4}", "{network.gateway.v6}"]\n'
    on_link = ", ".join(f'"{prefix}"' for prefix in network.prefixes.values())
    assert gateway in ground.public()
    policy = (
        ground.public().replace(gateway, f"    routes: external\n    on_link: [{on_link}]\n")
        + f"    vrf: {{name: {VRF}, table: {TABLE}, create: true}}\n"
    )
    ground.apply(policy)
    try:
        ground.lab.node.ip(
            [f"addr add {a}/{24 if a.version == 4 else 64} dev {network.device}" for a in NODE]
        )
        # An address of the node is no valid source from now on.
        ground.apply(policy)
        ground.lab.announce(network)
        router = Speaker(64513, 64512, network.gateway, NODE, announces_default=True)
        node = Speaker(64512, 64513, NODE, network.gateway, announced=tuple(network.vips.values()), vrf=VRF)
        with Frr(ground.lab["router"], router) as there, Frr(ground.lab.node, node) as here:
            made = Peers(ground, here, there)
            made.established()
            yield made
    finally:
        ground.apply()


def test_who_is_behind_the_router_is_answered_by_what_bgp_learned(peers: Peers) -> None:
    cells = [cell for cell in vlan_cells(peers.ground.lab.networks) if cell.expect is Way.ROUTER]
    assert faults(peers.ground, cells) == []
    assert peers.ground.lab.by_gateway.wrong_way() == 0
    assert not peers.ground.status().steps


def test_answers_leave_by_the_vrf_after_a_reset_as_before(peers: Peers) -> None:
    cells = [cell for cell in vlan_cells(peers.ground.lab.networks) if cell.client == "client"]
    peers.router.tell("clear bgp *")
    peers.node.wait(
        lambda: not any(peers.learned("node", family) for family in FAMILIES), "the default routes are gone"
    )
    peers.established()
    assert faults(peers.ground, cells) == []
    assert peers.ground.lab.by_gateway.wrong_way() == 0
    assert not peers.ground.status().steps
