# SPDX-License-Identifier: Apache-2.0
"""A node behind several gateways on one link, and clients whose requests come in by a router that never fails.

clients --- way in ------+
   |                     |
   +------ gateway 1 ----+--- (VLAN) --- eth0 node
   +------ gateway 2 ----+
   +------ gateway n ----+
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.service.daemon import PATIENCE_S, Node, wait_until
from tools.lab.netns import Namespace, new_prefix, remove

VIP = {4: "203.0.113.80", 6: "2001:db8:113::80"}
#: The way in, and behind it the gateways.
WAY_IN = 200
PORT = 5000


def gateway_address(number: int, family: int) -> str:
    return f"203.0.113.{number}" if family == 4 else f"2001:db8:113::{number}"


def client_address(number: int, family: int) -> str:
    return f"198.51.100.{number}" if family == 4 else f"2001:db8:51::{number:x}"


class Ground(Node):
    """A node whose eth0 is on a link with gateways 1 to `count`."""

    def __init__(self, folder: Path, count: int, *, clients: int = 16, own_address: bool = False) -> None:
        super().__init__(folder)
        # In memory, as /run is: a disk that others write to holds the daemon up for seconds.
        self.state = Path(tempfile.mkdtemp(dir="/dev/shm")) / "state"
        self.clients = clients
        prefix = new_prefix()
        self.link, self.outside = Namespace(f"{prefix}link"), Namespace(f"{prefix}out")
        self.routers: dict[int, Namespace] = {}
        self._prefix = prefix
        for namespace in (self.link, self.outside):
            namespace.create()
        self.link.ip(["link add name switch type bridge", "link set switch up"])
        self.outside.ip(["link add name switch type bridge", "link set switch up"])
        self.ns.ip([f"link set p-eth0 netns {self.link.name}"])
        self.link.ip(["link set p-eth0 master switch", "link set p-eth0 up"])
        self.ns.ip(["link set eth0 up"])
        for number in (*range(1, count + 1), WAY_IN):
            self.add_gateway(number)
        self._add_clients()
        self.ns.ip(
            [
                f"addr add {VIP[4]}/32 dev lo",
                f"-6 addr add {VIP[6]}/128 dev lo nodad",
                # As every node has: an answer is looked up without a mark first, and must not be refused by that.
                "route add default via 192.0.2.1 dev eth1 onlink",
                "-6 route add default via fe80::1 dev eth1",
                "neigh replace 192.0.2.1 lladdr 02:00:00:00:00:fe dev eth1",
                "-6 neigh replace fe80::1 lladdr 02:00:00:00:00:fe dev eth1",
            ]
        )
        self.ns.sysctl({"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1})
        # The way in asks for the VIP on the link, and somebody must say that it is here, as MetalLB would.
        link = json.loads(self.ns.run("ip", "-j", "link", "show", "dev", "eth0"))[0]["address"]
        self.routers[WAY_IN].ip(
            [
                f"neigh replace {VIP[4]} lladdr {link} dev eth0",
                f"-6 neigh replace {VIP[6]} lladdr {link} dev eth0",
            ]
        )
        if own_address:
            self.ns.ip(
                ["addr add 203.0.113.50/24 dev eth0", "-6 addr add 2001:db8:113::50/64 dev eth0 nodad"]
            )
        for namespace in (self.ns, self.link, self.outside, *self.routers.values()):
            namespace.settle()

    def add_gateway(self, number: int, *, link_address: str = "") -> None:
        """A router between the link and the clients."""
        router = self.routers[number] = Namespace(f"{self._prefix}r{number}")
        router.create()
        address = f"address {link_address} " if link_address else ""
        router.ip(
            [
                f"link add eth0 {address}type veth peer name r{number} netns {self.link.name}",
                f"link add eth1 type veth peer name r{number} netns {self.outside.name}",
                "link set eth0 up",
                "link set eth1 up",
                f"addr add {gateway_address(number, 4)}/24 dev eth0",
                f"addr add 192.0.2.{number}/24 dev eth1",
                f"-6 addr add {gateway_address(number, 6)}/64 dev eth0 nodad",
                f"-6 addr add 2001:db8:2::{number:x}/64 dev eth1 nodad",
                "route add 198.51.100.0/24 via 192.0.2.250 dev eth1",
                "-6 route add 2001:db8:51::/64 via 2001:db8:2::fa dev eth1",
            ]
        )
        router.sysctl(
            {
                "net/ipv4/ip_forward": 1,
                "net/ipv6/conf/all/forwarding": 1,
                "net/ipv4/conf/all/rp_filter": 0,
                "net/ipv4/conf/eth0/rp_filter": 0,
            }
        )
        for namespace in (self.link, self.outside):
            namespace.ip([f"link set r{number} master switch", f"link set r{number} up"])

    def remove_gateway(self, number: int) -> None:
        """The machine is gone, and its switch port still up.

        To delete its namespace would hold the lock that every change of a route needs for a second on a busy machine.
        """
        for namespace in (self.link, self.outside):
            namespace.ip([f"link set r{number} nomaster"])

    def cut_gateway(self, number: int) -> None:
        """Its link goes down."""
        self.routers[number].ip(["link set eth0 down"])

    def mend_gateway(self, number: int) -> None:
        """Its link comes back; the IPv6 address went with it."""
        address = gateway_address(number, 6)
        self.routers[number].ip(["link set eth0 up", f"-6 addr replace {address}/64 dev eth0 nodad"])

    def _add_clients(self) -> None:
        lines = ["addr add 192.0.2.250/24 dev switch", "-6 addr add 2001:db8:2::fa/64 dev switch nodad"]
        for number in range(1, self.clients + 1):
            lines.append(f"addr add {client_address(number, 4)}/32 dev lo")
            lines.append(f"-6 addr add {client_address(number, 6)}/128 dev lo nodad")
        lines.append(f"route add 203.0.113.0/24 via 192.0.2.{WAY_IN}")
        lines.append(f"-6 route add 2001:db8:113::/64 via 2001:db8:2::{WAY_IN:x}")
        self.outside.ip(lines)
        self.outside.sysctl({"net/ipv4/conf/all/rp_filter": 0, "net/ipv4/conf/switch/rp_filter": 0})

    def close(self) -> None:
        for namespace in (*self.routers.values(), self.link, self.outside):
            remove(namespace.name)
        shutil.rmtree(self.state.parent)
        super().close()

    def sent_by(self, number: int) -> int:
        """Packets that a gateway has forwarded to the clients."""
        text = self.routers[number].run("ip", "-j", "-s", "link", "show", "dev", "eth1")
        return int(json.loads(text)[0]["stats64"]["tx"]["packets"])

    def default_route(self, family: int) -> str:
        """The network's, in one line."""
        shown = self.ns.run("ip", f"-{family}", "route", "show", "table", "all", "proto", "78")
        lines = shown.replace("\n\t", " ").splitlines()
        return next((line for line in lines if line.startswith("default ")), "")

    def gateways_of(self, family: int, clients: int = 0) -> dict[int, str]:
        """Which gateway answers to each of the clients leave by, as the kernel looks it up."""
        mark = self._mark()
        lines = [
            f"route get {client_address(number, family)} from {VIP[family]} mark {mark}"
            for number in range(1, (clients or self.clients) + 1)
        ]
        shown = self.ns.run("ip", f"-{family}", "-batch", "-", stdin="\n".join(lines) + "\n")
        ways = [line.partition(" via ")[2].split()[0] for line in shown.splitlines() if " via " in line]
        assert len(ways) == len(lines), shown
        return dict(enumerate(ways, 1))

    def shares(self, family: int) -> Counter[str]:
        return Counter(self.gateways_of(family).values())

    def _mark(self) -> str:
        status = json.loads(self.datapath("status", "--json").stdout)
        return str(status["networks"][0]["fwmark"])

    def gateways_down(self) -> list[str]:
        status = json.loads(self.datapath("status", "--json").stdout)
        found: list[str] = status["networks"][0]["gateways_down"]
        return found

    @contextmanager
    def traffic(self, rate: int, *, families: tuple[int, ...] = (4,)) -> Iterator[dict[str, Any]]:
        """Numbered requests of all clients in turn; what became of them is in the dictionary afterwards."""
        servers = [_server(self.ns, VIP[family]) for family in families]
        flows = [
            (_client(self.outside, client_address(number, family), VIP[family]), index)
            for number in range(1, self.clients + 1)
            for index, family in enumerate(families)
        ]
        sockets = [*servers, *(sock for sock, _ in flows)]
        job = {
            "rate": rate,
            "servers": [server.fileno() for server in servers],
            "flows": [
                {"fd": sock.fileno(), "kind": "udp", "ident": 0, "server": index} for sock, index in flows
            ],
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.lab.steady"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[sock.fileno() for sock in sockets],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            text=True,
        )
        result: dict[str, Any] = {}
        try:
            assert process.stdin
            assert process.stdout
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "started\n"
            yield result
            process.stdin.write("\n")
            process.stdin.flush()
            result.update(json.loads(process.stdout.readline()))
            result["sent"] = sum(flow["sent"] for flow in result["flows"])
            result["lost"] = sum(flow["lost"] for flow in result["flows"])
            process.wait(PATIENCE_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(PATIENCE_S)
            for end in (process.stdin, process.stdout):
                if end is not None:
                    end.close()
            for sock in sockets:
                sock.close()


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _server(namespace: Namespace, address: str) -> socket.socket:
    sock = namespace.socket(_family(address), socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
    sock.bind((address, PORT))
    return sock


def _client(namespace: Namespace, address: str, vip: str) -> socket.socket:
    sock = namespace.socket(_family(address), socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 21)
    sock.bind((address, 0))
    sock.connect((vip, PORT))
    return sock


def policy_of(
    numbers: range, extra: str = "", *, backend: str = "nft", weights: dict[int, int] | None = None
) -> str:
    """A policy with these gateways in both families."""
    entries = []
    for family in (4, 6):
        for number in numbers:
            address = gateway_address(number, family)
            weight = (weights or {}).get(number)
            entries.append(f'{{address: "{address}", weight: {weight}}}' if weight else f'"{address}"')
    return (
        f"version: 1\nbackend: {backend}\nnode: {{internal: [10.112.0.0/12, 'fd00:10:112::/48']}}\nnetworks:\n"
        "  - name: public\n    interface: eth0\n"
        "    vips: [203.0.113.0/24, '2001:db8:113::/64']\n"
        f"    gateways: [{', '.join(entries)}]\n{extra}"
    )


def wait_for_route(ground: Ground, family: int, *, has: str = "", lacks: str = "") -> str:
    """Until the network's default route goes by one gateway, or no longer by another."""

    def found() -> str:
        route = ground.default_route(family)
        words = route.split()
        return route if route and (not has or has in words) and lacks not in words else ""

    return str(
        wait_until(found, f"a route {f'by {has}' if has else ''} {f'not by {lacks}' if lacks else ''}")
    )
