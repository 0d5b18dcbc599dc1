# SPDX-License-Identifier: Apache-2.0
"""What both tests of VRFs use: policies, and clients that try to get somewhere."""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tests.vm.conftest import Ground
from tools.lab.netns import Namespace
from tools.lab.patience import PATIENCE
from tools.lab.topology import BACKEND_PORT, ELSEWHERE, FAMILIES, GW, POD_A, IpAddress, Pair

RED = "    vrf: {name: red, table: 2, create: true}\n"
BLUE = "    vrf: {name: blue, table: 3, create: true}\n"
GIVEN = "    vrf: {name: blue, table: 3}\n"
UNCHECKED = '    reverse_path: {other: "off"}\n'
TABLES = {"red": 2, "blue": 3}

_ROUND_S = 0.2 * PATIENCE
_ROUNDS_MAX = 40
#: So often everybody is tried at least: a first packet may be lost while neighbours are looked for.
_ROUNDS_MIN = 3


@dataclass(frozen=True)
class Place:
    """Somebody with an address, who may be reached."""

    namespace: Namespace
    addresses: Pair


@dataclass(frozen=True)
class Client:
    """Who tries to reach somebody: behind which VRF, and who sends what is not its own to the node.

    Attributes:
        router, device: of his network, with the node as its neighbour.
        node: an address of the node there.
    """

    vrf: str
    place: Place
    router: Namespace
    device: str
    node: Pair

    @contextlib.contextmanager
    def sending(self, targets: Sequence[Pair]) -> Iterator[None]:
        """His network sends what is for these addresses to the node."""
        routes = [(target.get(f), self.node.get(f), f) for target in targets for f in FAMILIES]
        self.router.ip([f"-{f} route add {to} via {via} dev {self.device}" for to, via, f in routes])
        try:
            yield
        finally:
            self.router.ip([f"-{f} route del {to}" for to, _, f in routes])

    def arrives(self, places: dict[str, Place], family: int, until: set[str]) -> set[str]:
        """Which of the places get a datagram of his; asked for until these ones have.

        All are sent to in turn, so what did not arrive by then will not.
        """
        kind = socket.AF_INET if family == FAMILIES[0] else socket.AF_INET6
        found: set[str] = set()
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(self.place.namespace.socket(kind, socket.SOCK_DGRAM))
            client.bind((str(self.place.addresses.get(family)), 0))
            port = client.getsockname()[1].to_bytes(2, "big")
            listening = {}
            for name, place in places.items():
                server = place.namespace.socket(kind, socket.SOCK_RAW, socket.IPPROTO_UDP)
                listening[stack.enter_context(server)] = name
                server.bind((str(place.addresses.get(family)), 0))
            for count in range(1, _ROUNDS_MAX + 1):
                for place in places.values():
                    with contextlib.suppress(OSError):  # an ICMP error says no as well
                        client.sendto(b"is anybody there?", (str(place.addresses.get(family)), BACKEND_PORT))
                end = time.monotonic() + _ROUND_S
                while found != set(places) and (
                    ready := select.select([*listening], [], [], max(0, end - time.monotonic()))[0]
                ):
                    found |= {listening[server] for server in ready if port in server.recv(2048)[:24]}
                if until <= found and (count >= _ROUNDS_MIN or found == set(places)):
                    break
        return found

    def is_answered(self, server: Place, family: int) -> bool:
        """Whether a socket there hears him, and he its answer."""
        kind = socket.AF_INET if family == FAMILIES[0] else socket.AF_INET6
        where = (str(server.addresses.get(family)), BACKEND_PORT)
        with (
            server.namespace.socket(kind, socket.SOCK_DGRAM) as answering,
            self.place.namespace.socket(kind, socket.SOCK_DGRAM) as asking,
            self.sending([server.addresses]),
        ):
            answering.bind(where)
            asking.bind((str(self.place.addresses.get(family)), 0))
            for sock in (answering, asking):
                sock.settimeout(_ROUND_S)
            for _ in range(_ROUNDS_MAX):
                asking.sendto(b"is anybody there?", where)
                with contextlib.suppress(TimeoutError):
                    answering.sendto(*answering.recvfrom(100))
                    return asking.recv(100) == b"is anybody there?"
        return False


def client_of_blue(ground: Ground) -> Client:
    """The client behind the device that the lab was given."""
    path = ground.paths["given"]
    path.mac()
    return Client("blue", Place(path.far, path.client), path.far, path.far_device, path.vip)


def client_of_red(ground: Ground) -> Client:
    """The lab's own client, behind the router on the VLAN."""
    (network,) = ground.lab.networks
    place = Place(ground.lab[network.role("client")], network.client)
    vip = next(iter(network.vips.values()))
    return Client("red", place, ground.lab[network.role("router")], "br-vlan", vip)


def outside(ground: Ground) -> dict[str, Place]:
    """What a VRF must not lead to, unless the policy says so; `pod` is inside, and the policy does."""
    gw = ground.lab["gw"]
    return {
        "pod": Place(ground.lab["pod_a"], POD_A),
        "world": Place(gw, ELSEWHERE),
        "node's own network": Place(gw, GW),
    }


@contextlib.contextmanager
def leaking(ground: Ground, targets: dict[IpAddress, str]) -> Iterator[None]:
    """What a mistake would look like: rules before the kernel's one for VRFs, to tables by destination."""
    rules = [f"-{to.version} rule {{}} pref 950 to {to} lookup {table}" for to, table in targets.items()]
    ground.lab.node.ip([rule.format("add") for rule in rules])
    try:
        yield
    finally:
        ground.lab.node.ip([rule.format("del") for rule in rules])
