# SPDX-License-Identifier: Apache-2.0
"""Connections that are open while `isolate_clients` changes move to the new zone and go on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tools.lab import Lab, command, network
from tools.lab.servers import pattern_crc
from tools.lab.topology import FAMILIES, VIP_BACKENDS
from tools.lab.traffic import ask_line, connect, datagrams, download, upload

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PLAIN = ""
ISOLATED = "    isolate_clients: true\n"
SIZE = 200_000
ENTRY_ZONE = "zone-orig="


@pytest.fixture(scope="module", params=["ebpf", "nft"])
def changing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Changing]:
    with Lab(networks=[network(0), network(1)]) as lab:
        yield Changing(lab, tmp_path_factory.mktemp("state"), request.param)


class Changing:
    """A lab whose policy is applied again and again."""

    def __init__(self, lab: Lab, state: Path, backend: str) -> None:
        self.lab = lab
        self._state = state
        self._backend = backend

    def apply(self, network_extra: str) -> str:
        policy = self.lab.policy(extra=f"backend: {self._backend}\n", network_extra=network_extra)
        return command.apply(self.lab, self._state, policy)

    def zones(self) -> set[int]:
        """Zones of the original direction in which connections with a mark are."""
        text = self.lab.node.run("cat", "/proc/thread-self/net/nf_conntrack")
        lines = [line for line in text.splitlines() if "mark=0 " not in line]
        return {int(line.split(ENTRY_ZONE)[1].split()[0]) if ENTRY_ZONE in line else 0 for line in lines}


@contextmanager
def open_connections(lab: Lab) -> Iterator[list[tuple[str, socket.socket]]]:
    """One of each kind: by TCP and UDP, to every backend, from the two kinds of clients."""
    with ExitStack() as stack:
        opened = []
        for net in lab.networks:
            for backend in VIP_BACKENDS:
                for version in FAMILIES:
                    target = net.vips[backend].get(version)
                    for client in (net.role("client"), net.role("client_vlan")):
                        tcp = stack.enter_context(connect(lab, client, target))
                        udp = stack.enter_context(datagrams(lab, client, target))
                        opened += [(f"tcp {client} {backend} IPv{version}", tcp)]
                        opened += [(f"udp {client} {backend} IPv{version}", udp)]
        yield opened


def seen(name: str, sock: socket.socket) -> tuple[str, str, int]:
    """Who answers, and whom he sees."""
    if name.startswith("tcp"):
        answer = json.loads(ask_line(sock, "who"))
    else:
        sock.send(b"who")
        answer = json.loads(sock.recv(1000))
    return answer["server"], answer["source"], answer["port"]


@pytest.mark.parametrize(
    ("before", "after"),
    [(PLAIN, ISOLATED), (ISOLATED, PLAIN)],
    ids=["isolated", "no longer isolated"],
)
def test_open_connections_go_on(changing: Changing, before: str, after: str) -> None:
    lab = changing.lab
    changing.apply(before)
    old = changing.zones()
    with open_connections(lab) as opened:
        known = {name: seen(name, sock) for name, sock in opened}
        assert changing.zones() == ({0} if before == PLAIN else {40001, 40002})

        output = changing.apply(after)

        assert "move connections of public from conntrack zone" in output
        assert changing.zones() == ({0} if after == PLAIN else {40001, 40002}), old
        assert {name: seen(name, sock) for name, sock in opened} == known
        for name, sock in opened:
            if name.startswith("tcp"):
                assert download(sock, SIZE) == pattern_crc(SIZE), name
                assert upload(sock, SIZE) == pattern_crc(SIZE), name
    assert lab.wrong_way() == 0
