# SPDX-License-Identifier: Apache-2.0
"""Connections from the client to a service, asked again and again while a flowtable takes them over."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence

from tests.vm.conftest import Ground
from tools.lab import Backend
from tools.lab.lab import Lab
from tools.lab.netns import Namespace
from tools.lab.topology import FAMILIES, IpAddress
from tools.lab.traffic import ask_line, connect, datagrams

BACKENDS = (Backend.LOCAL_POD, Backend.REMOTE_POD)
KINDS = ("tcp", "udp")
#: The first ones make the connection and let it be taken over.
TURNS = 5


class Flow:
    """One connection from the client, or whoever."""

    def __init__(self, lab: Lab, kind: str, target: IpAddress, role: str = "client") -> None:
        open_ = connect if kind == "tcp" else datagrams
        self.kind, self.target = kind, target
        self.sock: socket.socket = open_(lab, role, target, seconds=20)

    def ask(self) -> dict[str, str]:
        """One request and its answer: who answers, and whom he saw.

        Raises:
            OSError: no answer.
        """
        if self.kind == "tcp":
            text = ask_line(self.sock, "who")
        else:
            self.sock.send(b"who")
            text = self.sock.recv(4096).decode()
        answer: dict[str, str] = json.loads(text)
        assert "source" in answer
        return answer

    def settle(self) -> None:
        """Ask until every packet goes the way that it will go from now on."""
        for _ in range(TURNS):
            self.ask()

    def offloaded(self, node: Namespace) -> bool:
        """Whether a flowtable of the node carries it."""
        return "OFFLOAD" in self.tracked(node)

    def tracked(self, node: Namespace) -> str:
        """What the node's connection tracking says of it."""
        version = "ipv4" if self.target.version == 4 else "ipv6"
        port = str(self.sock.getsockname()[1])
        options = ["-p", self.kind, "--orig-dst", str(self.target), "--orig-port-src", port]
        return node.run("conntrack", "-L", "-f", version, *options)


def conversations(
    lab: Lab, *, backends: Sequence[Backend] = BACKENDS, number: int = 0, role: str = "client"
) -> list[str]:
    """Ask by every kind of flow; what went wrong."""
    network = lab.networks[number]
    wrong = []
    for backend in backends:
        for family in FAMILIES:
            for kind in KINDS:
                flow = Flow(lab, kind, network.vips[backend].get(family), role)
                name = f"{kind} {backend} {flow.target}"
                with flow.sock:
                    try:
                        flow.settle()
                    except OSError as error:
                        wrong.append(f"{name}: {error!r}")
                    if not flow.offloaded(lab.node):
                        wrong.append(f"{name}: not taken over by the flowtable")
    return wrong


def ways(ground: Ground) -> set[str]:
    """Whom the node sent answers to on the VLAN, by hardware address."""
    (network,) = ground.lab.networks
    vips = {str(a) for pair in network.vips.values() for a in pair}
    return {seen.mac for seen in ground.lab.by_vlan[network.name].read() if seen.source in vips}


def has_chains(node: Namespace) -> bool:
    """Whether our table has those that stand beside a flowtable."""
    return "chain swap" in node.run("nft", "list", "table", "inet", "datapath")
