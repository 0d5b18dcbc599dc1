# SPDX-License-Identifier: Apache-2.0
"""Equal clients on two VLANs of one trunk, told apart by the eBPF program on the trunk and by their zones."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from datapath.kernel import ingress
from datapath.plan.ingress import Verdict
from datapath.plan.model import Backend
from tests.bpf.conftest import inside
from tests.netns.equals import ISOLATED
from tests.vm.conftest import Ground
from tests.vm.paths import PORT, Path, hardware_address
from tools.lab.patience import PATIENCE
from tools.lab.topology import FAMILIES

pytestmark = [
    pytest.mark.vm,
    pytest.mark.root,
    pytest.mark.bpf,
    pytest.mark.kernel_feature("8021q"),
]

IDS = (401, 402)
TRUNK = "trunk1"
SOURCE_PORT = 40100


def _network(path: Path, vlan_id: int) -> str:
    place = f"vlan: {{parent: {TRUNK}, id: {vlan_id}}}"
    return path.policy.replace(path.place, place).replace(path.name, f"v{vlan_id}", 1) + ISOLATED


@pytest.fixture
def trunk(ground: Ground) -> Iterator[Ground]:
    """Both VLANs have the same VIPs, gateway and client."""
    path = ground.paths["given"]
    ground.apply(*(_network(path, vlan_id) for vlan_id in IDS))
    mac = hardware_address(path.node, TRUNK).hex(":")
    for metric, vlan_id in enumerate(IDS, 10):
        device = f"{TRUNK}.{vlan_id}"
        path.far.ip(
            [
                f"link add link {TRUNK} name {device} type vlan id {vlan_id}",
                f"link set {device} up",
                f"-6 addr add {path.gateway.v6}/64 dev {device} noprefixroute",
                *(f"-{vip.version} route add {vip} dev {device} metric {metric}" for vip in path.vip),
                *(f"neigh replace {vip} lladdr {mac} dev {device} nud permanent" for vip in path.vip),
            ]
        )
    yield ground
    path.far.ip([f"link del {TRUNK}.{vlan_id}" for vlan_id in IDS])
    ground.apply()


def _sockets(
    stack: ExitStack, path: Path, family: int, kind: int
) -> tuple[socket.socket, list[socket.socket]]:
    """A server on the node, and a client on each VLAN, all of them from one address and port."""
    version = socket.AF_INET if family == FAMILIES[0] else socket.AF_INET6
    server = stack.enter_context(path.node.socket(version, kind))
    clients = [stack.enter_context(path.far.socket(version, kind)) for _ in IDS]
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((str(path.vip.get(family)), PORT))
    for vlan_id, client in zip(IDS, clients, strict=True):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, f"{TRUNK}.{vlan_id}".encode())
        client.bind((str(path.client.get(family)), SOURCE_PORT))
    for sock in (server, *clients):
        sock.settimeout(3 * PATIENCE)
    return server, clients


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_clients_of_one_trunk_are_both_served(trunk: Ground, family: int) -> None:
    path = trunk.paths["given"]
    with ExitStack() as stack:
        server, clients = _sockets(stack, path, family, socket.SOCK_DGRAM)
        for number, client in enumerate(clients):
            client.connect((str(path.vip.get(family)), PORT))
            client.send(b"%d" % number)
        heard = dict(server.recvfrom(10) for _ in clients)
        assert heard.keys() == {b"0", b"1"}
        # They look the same, so the kernel has given the second one another port.
        assert {peer[0] for peer in heard.values()} == {str(path.client.get(family))}
        assert len({peer[1] for peer in heard.values()}) == len(IDS)
        for said, peer in heard.items():
            server.sendto(said, peer)
        assert [client.recv(10) for client in clients] == [b"0", b"1"]
    with ExitStack() as stack:
        server, clients = _sockets(stack, path, family, socket.SOCK_STREAM)
        server.listen()
        for number, client in enumerate(clients):
            client.connect((str(path.vip.get(family)), PORT))
            client.send(b"%d" % number)
        for _ in clients:
            taken = stack.enter_context(server.accept()[0])
            taken.settimeout(3 * PATIENCE)
            taken.send(taken.recv(10))
        assert [client.recv(10) for client in clients] == [b"0", b"1"]
    drift = trunk.status()
    assert (drift.plan.backend, drift.steps) == (Backend.EBPF, ())
    with inside(trunk.lab.node.name):
        counters = ingress.read_counters()
    assert all(counters[trunk.slots[f"v{vlan_id}"]][Verdict.PASS].packets > 0 for vlan_id in IDS)
