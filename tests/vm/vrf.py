# SPDX-License-Identifier: Apache-2.0
"""What both tests of VRFs use: policies, and a client that tries to get somewhere."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

from tests.vm.conftest import Ground
from tests.vm.paths import Path
from tools.lab.patience import PATIENCE
from tools.lab.topology import BACKEND_PORT, FAMILIES, Pair

RED = "    vrf: {name: red, table: 2, create: true}\n"
BLUE = "    vrf: {name: blue, table: 3, create: true}\n"
GIVEN = "    vrf: {name: blue, table: 3}\n"
UNCHECKED = '    reverse_path: {other: "off"}\n'


@contextlib.contextmanager
def sent_to_the_node(path: Path, targets: list[Pair]) -> Iterator[None]:
    """The client's network sends what is for these addresses to the node."""
    path.mac()
    routes = [(target.get(f), path.vip.get(f), f) for target in targets for f in FAMILIES]
    path.far.ip([f"-{f} route add {to} via {vip} dev {path.far_device}" for to, vip, f in routes])
    try:
        yield
    finally:
        path.far.ip([f"-{f} route del {to}" for to, _, f in routes])


def reaches(ground: Ground, role: str, target: Pair, family: int) -> bool:
    """Whether a datagram of the path's client arrives in that namespace."""
    path, kind = ground.paths["given"], socket.AF_INET if family == FAMILIES[0] else socket.AF_INET6
    with (
        ground.lab[role].socket(kind, socket.SOCK_RAW, socket.IPPROTO_UDP) as server,
        path.far.socket(kind, socket.SOCK_DGRAM) as client,
    ):
        server.settimeout(0.5 * PATIENCE)
        client.bind((str(path.client.get(family)), 0))
        client.connect((str(target.get(family)), BACKEND_PORT))
        port = client.getsockname()[1].to_bytes(2, "big")
        for _ in range(4):
            with contextlib.suppress(OSError):  # an ICMP error says no as well
                client.send(b"is anybody there?")
            with contextlib.suppress(TimeoutError):
                while port not in server.recv(2048)[:24]:
                    pass
                return True
    return False
