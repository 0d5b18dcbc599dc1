# SPDX-License-Identifier: Apache-2.0
"""Connections that are open while `isolate_clients` changes move to the new zone and go on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from datapath.controller import Controller
from datapath.errors import KernelError
from datapath.policy import LoadedPolicy, parse_policy
from datapath.state import StateDirectory
from datapath.undertaking import Undertaking
from tests.bpf.conftest import inside
from tools.lab import Lab, command, network
from tools.lab.servers import pattern_crc
from tools.lab.topology import FAMILIES, VIP_BACKENDS
from tools.lab.traffic import Transfer, ask_line, connect, datagrams, download, upload

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

    def _policy(self, network_extra: str, extra: str) -> str:
        return self.lab.policy(extra=f"backend: {self._backend}\n{extra}", network_extra=network_extra)

    def apply(self, network_extra: str, extra: str = "") -> str:
        return command.apply(self.lab, self._state, self._policy(network_extra, extra))

    def controller(self) -> Controller:
        """On the same state."""
        return Controller(StateDirectory(self._state))

    def loaded(self, network_extra: str) -> LoadedPolicy:
        """For `controller`."""
        return parse_policy(self._policy(network_extra, "").encode(), "change.yaml")

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


def test_a_change_that_is_undone_moves_them_back(changing: Changing, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = changing.lab
    changing.apply(PLAIN)

    def fail(*_: object) -> None:
        raise KernelError("verify", "on purpose")

    with open_connections(lab) as opened:
        known = {name: seen(name, sock) for name, sock in opened}
        with monkeypatch.context() as patched, inside(lab.node.name):
            patched.setattr(Undertaking, "verify", fail)
            with pytest.raises(KernelError, match="on purpose"):
                changing.controller().apply(changing.loaded(ISOLATED))
        assert changing.zones() == {0}
        assert {name: seen(name, sock) for name, sock in opened} == known
    assert lab.wrong_way() == 0


def test_marks_of_isolated_connections_change(changing: Changing) -> None:
    """An entry is known by its zone, too."""
    changing.apply(ISOLATED)
    with open_connections(changing.lab) as opened:
        known = {name: seen(name, sock) for name, sock in opened}
        changing.apply(ISOLATED, "marks: {mask: 0x0ff00000}\n")
        assert {name: seen(name, sock) for name, sock in opened} == known
        assert changing.zones() == {40001, 40002}
    changing.apply(ISOLATED)
    assert changing.lab.wrong_way() == 0


def test_transfers_go_on_while_zones_change(changing: Changing) -> None:
    """What is sent meanwhile is sent again; no connection breaks."""
    lab = changing.lab
    changing.apply(PLAIN)
    with ExitStack() as stack:
        transfers = [
            stack.enter_context(
                Transfer(lab, net.role("client"), net.vips[backend].get(version), pause_s=0.02)
            )
            for net in lab.networks
            for backend in VIP_BACKENDS
            for version in FAMILIES
        ]
        for policy in (ISOLATED, PLAIN, ISOLATED, PLAIN):
            changing.apply(policy)
            turns = [transfer.turns for transfer in transfers]
            end = time.monotonic() + 60
            while time.monotonic() < end and any(
                transfer.turns == before and transfer.error is None
                for transfer, before in zip(transfers, turns, strict=True)
            ):
                time.sleep(0.05)
            assert [transfer.error for transfer in transfers if transfer.error] == []
            assert all(t.turns > before for t, before in zip(transfers, turns, strict=True))
    assert lab.wrong_way() == 0
