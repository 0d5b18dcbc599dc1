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
# Sends with DF whatever path MTU was learnt, and reports the error.
_IP_MTU_DISCOVER, _IP_PMTUDISC_PROBE, _IPV6_MTU_DISCOVER = 10, 3, 23


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


MUTE = """
table inet mute {
  chain out {
    type filter hook output priority 0;
    icmp type destination-unreachable drop
    icmpv6 type packet-too-big drop
  }
}
"""


def test_path_mtu_behind_the_vlan_reaches_every_kind_of_server(tmp_path: Path) -> None:
    size = 1 << 20
    with Lab() as lab, mtu(lab, "router", "to-client", SMALL_MTU):
        network = lab.networks[0]
        command.apply(lab, tmp_path, lab.policy())

        # First without the errors: the transfer must stall, or the rest shows nothing.
        lab["router"].nft(MUTE)
        for family in (4, 6):
            vip = network.vips[Backend.LOCAL_POD].get(family)
            with connect(lab, "client", vip, seconds=1) as sock, pytest.raises(TimeoutError):
                download(sock, size)
            assert path_mtu(lab, "pod_a", str(network.client.get(family))) == 1500

        lab["router"].nft("delete table inet mute")
        for family in (4, 6):
            for backend in VIP_BACKENDS:
                with connect(lab, "client", network.vips[backend].get(family)) as sock:
                    assert download(sock, size) == pattern_crc(size), backend
            assert path_mtu(lab, "pod_a", str(network.client.get(family))) == SMALL_MTU
        assert lab.by_gateway.wrong_way() == 0


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
        connect(served, client, vip, port=81)
    assert errors_left_by_vlan(served, str(vip), str(served.networks[0].clients[client].get(family)))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("established", [True, False], ids=["established", "first-packet"])
@pytest.mark.parametrize("client", CLIENTS)
def test_time_exceeded_of_the_node_leaves_by_the_vlan(
    served: Lab, client: str, established: bool, family: int
) -> None:
    network = served.networks[0]
    vip = network.vips[Backend.LOCAL_POD].get(family)
    hops = 1 if client == "client_vlan" else 2
    level, ttl = (
        (socket.IPPROTO_IP, socket.IP_TTL) if family == 4 else (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)
    )
    with datagrams(served, client, vip) as sock:
        if established:
            sock.send(b"hello")
            assert sock.recv(100) == b"hello"
        reset(served)
        sock.setsockopt(level, ttl, hops)
        sock.setsockopt(
            *((socket.IPPROTO_IP, 11) if family == 4 else (socket.IPPROTO_IPV6, 25)), 1
        )  # IP_RECVERR
        sock.send(b"too far")
        with pytest.raises(OSError, match="No route to host"):
            sock.recv(100)
    assert errors_left_by_vlan(served, str(vip), str(network.clients[client].get(family)))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("established", [True, False], ids=["established", "first-packet"])
@pytest.mark.parametrize("client", CLIENTS)
def test_fragmentation_needed_of_the_node_leaves_by_the_vlan(
    served: Lab, client: str, established: bool, family: int
) -> None:
    network = served.networks[0]
    vip = network.vips[Backend.LOCAL_POD].get(family)
    with mtu(served, "node", "to-pod_a", SMALL_MTU), datagrams(served, client, vip) as sock:
        if established:
            sock.send(b"hello")
            assert sock.recv(100) == b"hello"
        reset(served)
        option = (
            (socket.IPPROTO_IP, _IP_MTU_DISCOVER)
            if family == 4
            else (socket.IPPROTO_IPV6, _IPV6_MTU_DISCOVER)
        )
        sock.setsockopt(*option, _IP_PMTUDISC_PROBE)
        sock.send(bytes(1400))
        with pytest.raises(OSError, match="Message too long") as caught:
            sock.recv(2000)
        assert caught.value.errno == errno.EMSGSIZE
    assert errors_left_by_vlan(served, str(vip), str(network.clients[client].get(family)))
