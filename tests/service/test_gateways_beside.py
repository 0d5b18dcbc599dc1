# SPDX-License-Identifier: Apache-2.0
"""Several gateways of a network that isolates its clients and that connections from inside leave by."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.service.daemon import Daemon, wait_until
from tests.service.gateway_ground import PORT, VIP, Ground, client_address, policy_of, wait_for_route

pytestmark = pytest.mark.root

POD = {4: "10.112.0.9", 6: "fd00:10:112::9"}
NETWORK = """\
    gateway_mode: active_standby
    gateway_check: {interval_ms: 50, hold_s: 1}
    isolate_clients: true
"""
EGRESS = f"""\
egress:
  - name: web
    network: public
    sources: ["{POD[4]}", "{POD[6]}"]
    source_ip: ["{VIP[4]}", "{VIP[6]}"]
"""


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    """Two gateways; who opens connections from inside is an address of the node here."""
    made = Ground(tmp_path, 2, clients=8)
    made.policy.write_text(policy_of(range(1, 3), NETWORK) + EGRESS)
    made.ns.ip([f"addr add {POD[4]}/32 dev lo", f"-6 addr add {POD[6]}/128 dev lo nodad"])
    yield made
    made.close()


class Pod:
    """A datagram socket of the pod, and a client that answers it."""

    def __init__(self, stack: ExitStack, ground: Ground, family: int, number: int) -> None:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        self._client = stack.enter_context(ground.outside.socket(kind, socket.SOCK_DGRAM))
        self._client.bind((client_address(number, family), PORT))
        self._pod = stack.enter_context(ground.ns.socket(kind, socket.SOCK_DGRAM))
        self._pod.bind((POD[family], 0))
        self._pod.connect((client_address(number, family), PORT))
        for sock in (self._client, self._pod):
            sock.settimeout(0.2)
        self._count = 0

    def ask(self) -> str:
        """The source that the client sees; empty where nothing came, or no answer to it."""
        self._count += 1
        question = b"%d" % self._count
        self._pod.send(question)
        try:
            heard, peer = self._client.recvfrom(10)
            while heard != question:
                heard, peer = self._client.recvfrom(10)
            self._client.sendto(heard, peer)
            return str(peer[0]) if self._pod.recv(10) == question else ""
        except OSError:  # no answer in time, or an ICMP error about an earlier one
            return ""


@pytest.mark.parametrize("family", [4, 6])
def test_connections_from_inside_leave_by_a_gateway_that_lives(ground: Ground, family: int) -> None:
    """Those that were open go on, and new ones take the same way; what clients asked is answered by it, too."""
    with ExitStack() as stack, Daemon(ground).started() as daemon:
        wait_for_route(ground, family, has=("203.0.113.1", "2001:db8:113::1")[family == 6])
        old = Pod(stack, ground, family, 1)
        wait_until(lambda: old.ask() == VIP[family], "an answer by the first gateway")
        before = ground.sent_by(1)
        assert [old.ask() for _ in range(50)] == [VIP[family]] * 50
        assert ground.sent_by(1) >= before + 50

        ground.remove_gateway(1)
        daemon.wait_for("gateways_switched")
        wait_for_route(ground, family, has=("203.0.113.2", "2001:db8:113::2")[family == 6])
        new = Pod(stack, ground, family, 2)
        wait_until(lambda: new.ask() == VIP[family], "an answer by the second gateway")
        dead, alive = ground.sent_by(1), ground.sent_by(2)
        assert [pod.ask() for pod in (old, new) for _ in range(50)] == [VIP[family]] * 100
        assert ground.sent_by(2) >= alive + 100
        assert ground.sent_by(1) == dead
        with ground.traffic(200, families=(family,)) as result:
            wait_until(lambda: ground.sent_by(2) >= alive + 300, "answers to clients")
        assert (result["lost"], result["elsewhere"]) == (0, 0)
        status = ground.datapath("status")
        assert status.returncode == 0, status.stdout
        assert "203.0.113.1 (down)" in status.stdout
        assert daemon.stop() == 0
