# SPDX-License-Identifier: Apache-2.0
"""Which gateway the kernel gives which flow, asked of the kernel: only flows of a gateway that is down move.

Left out on 6.12 of Debian: `make test` runs it on the kernel of this machine, and 6.1 is the oldest.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network, ip_address

import pytest

from datapath.compiler.gateways import by_gateways
from datapath.kernel.rtnl import FibChange, Rtnl, Verb
from datapath.plan.ingress import IpNetwork
from datapath.plan.rtnl import Family, Route
from datapath.policy import Network
from tests.netns.nodes import Node, inside, node

pytestmark = [pytest.mark.root, pytest.mark.vm, pytest.mark.one_kernel("6.1")]

TABLE, MARK, CLIENTS = 700_001, 7, 250
PREFIX = {Family.IPV4: "10.9.0.0/24", Family.IPV6: "2001:db8:9::/64"}
ALL: dict[Family, IpNetwork] = {Family.IPV4: IPv4Network("0.0.0.0/0"), Family.IPV6: IPv6Network("::/0")}


@pytest.fixture(scope="module")
def ground() -> Iterator[Node]:
    with node(4) as made, inside(made.namespace.name):
        for family in Family:
            made.namespace.ip([f"-{family} rule add priority 5 fwmark {MARK} lookup {TABLE}"])
        yield made


def gateways(family: Family, count: int) -> list[str]:
    stem = "10.9.0." if family is Family.IPV4 else "2001:db8:9::"
    return [f"{stem}{number}" for number in range(1, count + 1)]


def ways(ground: Node, family: Family) -> list[str]:
    """The gateway of each client, as the kernel looks it up."""
    stem = "198.51.100." if family is Family.IPV4 else "2001:db8:51::"
    lines = "".join(f"route get {stem}{number:x} mark {MARK}\n" for number in range(1, CLIENTS + 1))
    if family is Family.IPV4:
        lines = "".join(f"route get {stem}{number} mark {MARK}\n" for number in range(1, CLIENTS + 1))
    shown = ground.namespace.run("ip", f"-{family}", "-batch", "-", stdin=lines)
    found = [line.partition(" via ")[2].split()[0] for line in shown.splitlines() if " via " in line]
    assert len(found) == CLIENTS, shown
    return found


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("weights", [(1, 1), (1, 1, 1), (3, 1, 2, 1)])
def test_only_flows_of_a_dead_gateway_move(ground: Node, family: Family, weights: tuple[int, ...]) -> None:
    names = gateways(family, len(weights))
    body = [{"address": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]
    network = Network.model_validate(
        {"name": "n", "interface": "eth1", "vips": [PREFIX[family]], "gateways": body}
    )
    route = Route(TABLE, ALL[family], "eth1", metric=1024)

    def use(*down: str) -> list[str]:
        rtnl.change([FibChange(Verb.REPLACE, by_gateways(route, network, list(map(ip_address, down))))])
        return ways(ground, family)

    with Rtnl() as rtnl:
        before = use()
        assert set(before) == set(names)
        for name in names:
            during = use(name)
            assert name not in during
            assert {old for old, new in zip(before, during, strict=True) if old != new} == {name}
            assert use() == before, "and back"
        if family is Family.IPV4 and len(names) > 2:
            assert set(use(names[0])) == set(names[1:]), "all others take a part"
            use()
        rtnl.change([FibChange(Verb.DELETE, by_gateways(route, network, ()))])
