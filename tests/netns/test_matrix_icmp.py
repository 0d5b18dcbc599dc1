# SPDX-License-Identifier: Apache-2.0
"""ICMP errors about a flow: those of others reach the server, and the node's own leave by the VLAN."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tools.lab import VIP_BACKENDS, Backend, Lab, command
from tools.lab.servers import pattern_crc
from tools.lab.traffic import connect, datagrams, download

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SMALL_MTU = 1300
CLIENTS = ("client", "client_vlan", "client_overlap")
_IP_MTU_DISCOVER, _IP_PMTUDISC_DO, _IPV6_MTU_DISCOVER = 10, 2, 23
#: Host backends reached by DNAT answer from the node's own address in an error, so that is the one to look for nowhere.
POD_SERVERS = {Backend.LOCAL_POD: "pod_a", Backend.REMOTE_POD: "pod_remote"}


@contextmanager
def mtu(lab: Lab, role: str, device: str, value: int) -> Iterator[None]:
    lab[role].ip([f"link set {device} mtu {value}"])
    try:
        yield
    finally:
        lab[role].ip([f"link set {device} mtu 1500"])


def errors_left_by_vlan(lab: Lab, source: str, client: str) -> bool:
    """Whether an ICMP error went from `source` to the client by the VLAN; fails if any went elsewhere."""
    assert lab.by_gateway.wrong_way() == 0
    return any(
        s.source == source and s.destination == client and s.protocol in ("icmp", "ipv6-icmp")
        for s in lab.by_vlan[lab.networks[0].name].read()
    )


def reset(lab: Lab) -> None:
    lab.by_gateway.reset()
    lab.by_vlan[lab.networks[0].name].reset()


def path_mtu(lab: Lab, role: str, destination: str) -> int:
    route = json.loads(lab[role].run("ip", "-j", "route", "get", destination))[0]
    return int(next((m["mtu"] for m in route.get("metrics", ()) if "mtu" in m), 1500))


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Lab]:
    """A lab without learnt path MTUs."""
    with Lab() as built:
        command.apply(built, tmp_path, built.policy())
        yield built


@pytest.mark.parametrize("family", [4, 6])
def test_path_mtu_behind_the_vlan_reaches_every_kind_of_server(fresh: Lab, family: int) -> None:
    size = 1 << 20
    network = fresh.networks[0]
    with mtu(fresh, "router", "to-client", SMALL_MTU):
        for backend in VIP_BACKENDS:
            with connect(fresh, "client", network.vips[backend].get(family)) as sock:
                assert download(sock, size) == pattern_crc(size), backend
    assert path_mtu(fresh, "pod_a", str(network.client.get(family))) == SMALL_MTU
    assert fresh.by_gateway.wrong_way() == 0


def test_path_mtu_is_not_learnt_without_the_error(fresh: Lab) -> None:
    """The same with the errors dropped: so the test above can fail."""
    fresh["router"].nft("table ip mute { chain out { type filter hook output priority 0; ip protocol icmp drop; }; }")
    with mtu(fresh, "router", "to-client", SMALL_MTU), pytest.raises(TimeoutError):
        sock = connect(fresh, "client", fresh.networks[0].vips[Backend.LOCAL_POD].v4, seconds=1)
        with sock:
            download(sock, 1 << 20)
    assert path_mtu(fresh, "pod_a", str(fresh.networks[0].client.v4)) == 1500


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("client", CLIENTS)
def test_port_unreachable_of_the_node_leaves_by_the_vlan(served: Lab, client: str, family: int) -> None:
    vip = served.networks[0].vips[Backend.HOST_VIP].get(family)
    reset(served)
    with datagrams(served, client, vip, port=81) as sock:
        sock.send(b"anyone?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
    with pytest.raises(ConnectionRefusedError):
        connect(served, client, vip, port=81, seconds=1)
    assert errors_left_by_vlan(served, str(vip), str(served.networks[0].clients[client].get(family)))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("established", [True, False], ids=["established", "first-packet"])
@pytest.mark.parametrize("client", CLIENTS)
def test_time_exceeded_of_the_node_leaves_by_the_vlan(served: Lab, client: str, established: bool, family: int) -> None:
    network = served.networks[0]
    vip = network.vips[Backend.LOCAL_POD].get(family)
    hops = 1 if client == "client_vlan" else 2
    level, ttl = (socket.IPPROTO_IP, socket.IP_TTL) if family == 4 else (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
    with datagrams(served, client, vip) as sock:
        if established:
            sock.send(b"hello")
            assert sock.recv(100) == b"hello"
        reset(served)
        sock.setsockopt(level, ttl, hops)
        sock.setsockopt(*((socket.IPPROTO_IP, 11) if family == 4 else (socket.IPPROTO_IPV6, 25)), 1)  # IP_RECVERR
        sock.send(b"too far")
        with pytest.raises(OSError, match="No route to host"):
            sock.recv(100)
    assert errors_left_by_vlan(served, str(vip), str(network.clients[client].get(family)))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("established", [True, False], ids=["established", "first-packet"])
@pytest.mark.parametrize("client", CLIENTS)
def test_fragmentation_needed_of_the_node_leaves_by_the_vlan(fresh: Lab, client: str, established: bool, family: int) -> None:
    network = fresh.networks[0]
    vip = network.vips[Backend.LOCAL_POD].get(family)
    with mtu(fresh, "node", "to-pod_a", SMALL_MTU), datagrams(fresh, client, vip) as sock:
        if established:
            sock.send(b"hello")
            assert sock.recv(100) == b"hello"
        reset(fresh)
        option = (socket.IPPROTO_IP, _IP_MTU_DISCOVER) if family == 4 else (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER)
        sock.setsockopt(*option, _IP_PMTUDISC_DO)
        sock.send(bytes(1400))
        with pytest.raises(OSError, match="Message too long") as caught:
            sock.recv(2000)
        assert caught.value.errno == errno.EMSGSIZE
    assert errors_left_by_vlan(fresh, str(vip), str(network.clients[client].get(family)))
