# SPDX-License-Identifier: Apache-2.0
"""Flows that are older than the policy, and flows that live while it changes."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tools.lab import VIP_BACKENDS, Backend, Lab, command, network
from tools.lab.topology import IpAddress
from tools.lab.traffic import PingFlood, Transfer, ask_line, connect, datagrams, family

pytestmark = [pytest.mark.root, pytest.mark.bpf]

CLIENTS = ("client", "client_vlan", "client_overlap")


@pytest.fixture
def plain() -> Iterator[Lab]:
    """A lab without a policy."""
    with Lab() as built:
        yield built


@pytest.fixture
def two() -> Iterator[Lab]:
    """A lab with two networks, without a policy."""
    with Lab(networks=[network(0), network(1)]) as built:
        yield built


def old_flows(lab: Lab) -> dict[str, socket.socket]:
    """Return a UDP socket of every client, backend kind and family, by name."""
    return {
        f"{client} {backend} {version}": datagrams(
            lab, client, lab.networks[0].vips[backend].get(version), seconds=0.3
        )
        for client in CLIENTS
        for backend in VIP_BACKENDS
        for version in (4, 6)
    }


def unanswered(flows: dict[str, socket.socket], text: bytes) -> list[str]:
    """Send a datagram on every flow and return the names of those that get no answer."""
    for sock in flows.values():
        sock.send(text)
    missing = []
    for name, sock in flows.items():
        try:
            while sock.recv(100) != text:  # an answer to an earlier one
                continue
        except TimeoutError:
            missing.append(name)
    return missing


def test_datagram_flows_older_than_the_policy_are_right_with_their_next_packet(
    plain: Lab, tmp_path: Path
) -> None:
    flows = old_flows(plain)
    for sock in flows.values():
        sock.setblocking(False)
        sock.send(b"before")
        sock.settimeout(0.05)
    assert unanswered(flows, b"still before") == list(flows)

    command.apply(plain, tmp_path, plain.policy())
    plain.by_gateway.reset()
    for sock in flows.values():
        sock.settimeout(10)
    assert unanswered(flows, b"after") == []
    assert plain.by_gateway.wrong_way() == 0
    for sock in flows.values():
        sock.close()


def test_pings_older_than_the_policy_are_right_with_their_next_packet(plain: Lab, tmp_path: Path) -> None:
    vips = [plain.networks[0].vips[Backend.LOCAL_POD].get(version) for version in (4, 6)]
    before = ping(plain, vips, last_s=0.5)
    assert [len(flood.lost) for flood in before] == [flood.sent for flood in before]

    command.apply(plain, tmp_path, plain.policy())
    # The same identifiers: the same connection-tracking entries.
    assert [flood.lost for flood in ping(plain, vips)] == [set(), set()]


def ping(lab: Lab, targets: list[IpAddress], *, last_s: float = 10) -> list[PingFlood]:
    """Ping all targets from the client at the same time, at least ten times each."""
    with ExitStack() as stack:
        floods = [stack.enter_context(PingFlood(lab, "client", target, last_s=last_s)) for target in targets]
        while any(flood.turns < 10 and flood.error is None for flood in floods):
            threading.Event().wait(0.01)
    assert [flood.error for flood in floods] == [None for _ in floods]
    return floods


def test_handshakes_begun_before_the_policy_complete_after_it(plain: Lab, tmp_path: Path) -> None:
    vips = [plain.networks[0].vips[backend].get(version) for backend in VIP_BACKENDS for version in (4, 6)]
    socks = [(vip, plain["client"].socket(family(vip), socket.SOCK_STREAM)) for vip in vips]
    for vip, sock in socks:
        sock.settimeout(0.1)
        with pytest.raises(TimeoutError):
            sock.connect((str(vip), 80))

    command.apply(plain, tmp_path, plain.policy())
    for _, sock in socks:
        with sock:
            # The kernel goes on with the handshake by itself, with growing pauses.
            assert select.select([], [sock], [], 20)[1]
            sock.settimeout(10)
            assert '"source"' in ask_line(sock, "who")


def test_connection_survives_teardown_and_a_new_apply(plain: Lab, tmp_path: Path) -> None:
    vips = plain.networks[0].vips
    command.apply(plain, tmp_path, plain.policy())
    socks = [
        connect(plain, client, vips[backend].get(version))
        for client in CLIENTS
        for backend in (Backend.LOCAL_POD, Backend.HOST_VIP)
        for version in (4, 6)
    ]
    for sock in socks:
        assert '"source"' in ask_line(sock, "who")

    command.teardown(plain, tmp_path)
    command.apply(plain, tmp_path, plain.policy())
    for sock in socks:
        with sock:
            assert '"source"' in ask_line(sock, "who")


@pytest.mark.slow
def test_reload_loses_nothing(two: Lab, tmp_path: Path) -> None:
    small, large = Lab(networks=two.networks[:1]).policy(), two.policy()
    moved = small.replace("version: 1", "version: 1\nrules:\n  priority: 20000")
    vips = two.networks[0].vips
    command.apply(two, tmp_path, small)
    two.by_gateway.reset()

    with ExitStack() as stack:
        floods = [
            stack.enter_context(PingFlood(two, client, vips[backend].get(version)))
            for client, backend in zip(
                CLIENTS, (Backend.HOST_VIP, Backend.LOCAL_POD, Backend.REMOTE_POD), strict=True
            )
            for version in (4, 6)
        ]
        transfers = [
            stack.enter_context(Transfer(two, "client", vips[Backend.LOCAL_POD].v6)),
            stack.enter_context(Transfer(two, "client_overlap", vips[Backend.HOST_VIP].v4)),
            stack.enter_context(Transfer(two, "client_vlan", vips[Backend.REMOTE_POD].v4)),
        ]
        for policy in (large, small, small, moved, large):
            turns = [transfer.turns for transfer in transfers]
            command.apply(two, tmp_path, policy)
            while any(
                t.turns == before and t.error is None for t, before in zip(transfers, turns, strict=True)
            ):
                threading.Event().wait(0.02)

    assert [transfer.error for transfer in transfers] == [None, None, None]
    assert min(transfer.turns for transfer in transfers) >= 5
    assert [(flood.error, flood.lost) for flood in floods] == [(None, set())] * 6
    assert min(flood.sent for flood in floods) > 50
    assert two.by_gateway.wrong_way() == 0
