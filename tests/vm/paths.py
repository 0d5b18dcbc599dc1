# SPDX-License-Identifier: Apache-2.0
"""Ways into the node, one per kind of device: each with a router and client behind it, and a VIP of its own."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bpf.packets import ETH_P_IP, ETH_P_IPV6, checksum, ipv4, ipv6
from tools.lab.netns import Namespace
from tools.lab.patience import PATIENCE
from tools.lab.topology import FAMILIES, IpAddress, Pair, pair

PORT = 9
_ATTEMPTS = 4
_WAIT = 0.5 * PATIENCE
_payloads = itertools.count(1)


@dataclass(frozen=True)
class Path:
    """One way in.

    Attributes:
        name: of the network in the policy.
        number: tells its addresses from those of the others.
        place: the policy's line that names the device.
        device: where the node's IP stack sees the packets.
        far_device: the same at the other end, in the namespace `far`.
    """

    name: str
    number: int
    place: str
    device: str
    far_device: str
    node: Namespace
    far: Namespace

    @property
    def gateway(self) -> Pair:
        return pair(f"203.0.{self.number}.1", f"2001:db8:f{self.number:02x}::1")

    @property
    def vip(self) -> Pair:
        return pair(f"203.0.{self.number}.10", f"2001:db8:f{self.number:02x}::10")

    @property
    def client(self) -> Pair:
        return pair(f"198.18.{self.number}.10", f"2001:db8:e{self.number:02x}::10")

    @property
    def policy(self) -> str:
        """The network's element of the policy's list."""
        return (
            f"  - name: {self.name}\n    {self.place}\n"
            f'    vips: [203.0.{self.number}.0/24, "2001:db8:f{self.number:02x}::/64"]\n'
            f'    gateway: [{self.gateway.v4}, "{self.gateway.v6}"]\n'
        )

    def address(self) -> None:
        """Give both ends their addresses; the node's device gets none."""
        self.node.ip([f"addr add {self.vip.v4}/32 dev lo", f"addr add {self.vip.v6}/128 dev lo"])
        self.far.ip(
            [
                f"addr add {self.gateway.v4}/24 dev {self.far_device}",
                f"addr add {self.gateway.v6}/64 dev {self.far_device}",
                f"addr add {self.client.v4}/32 dev lo",
                f"addr add {self.client.v6}/128 dev lo",
            ]
        )

    def mac(self) -> bytes:
        """Of the node's device; the VIPs are known by it from now on."""
        mac = hardware_address(self.node, self.device)
        # Nobody announces the VIPs here: what is tested is where the packets enter.
        self.far.ip(
            [
                f"neigh replace {vip} lladdr {mac.hex(':')} dev {self.far_device} nud permanent"
                for vip in self.vip
            ]
        )
        return mac

    def is_served(self, family: int, *, attempts: int = _ATTEMPTS) -> bool:
        """Whether a request of the client arrives, and its answer, too."""
        self.mac()
        with (
            _bound(self.node, self.vip.get(family), PORT) as server,
            _bound(self.far, self.client.get(family), 0) as client,
        ):
            return any(self._ask(client, server, family) for _ in range(attempts))

    def _ask(self, client: socket.socket, server: socket.socket, family: int) -> bool:
        question = str(next(_payloads)).encode()
        client.sendto(question, (str(self.vip.get(family)), PORT))
        try:
            data, peer = server.recvfrom(2048)
            server.sendto(data, peer)
            return client.recv(2048) == question
        except TimeoutError:  # the first one may be lost while neighbours are resolved
            return False

    def arrived(self, sources: Sequence[IpAddress]) -> list[IpAddress]:
        """Which of packets with these sources, all of one family, reach a socket at the VIP.

        Raises:
            TimeoutError: nor does one from the client, which is sent after them.
        """
        family = sources[0].version
        return strike(
            Strike(self.far, self.far_device, self.mac()),
            (self.node, self.vip.get(family)),
            [*sources, self.client.get(family)],
        )[:-1]


@dataclass(frozen=True, slots=True)
class Strike:
    """Where frames are made: a namespace, its device, and the hardware address they go to."""

    namespace: Namespace
    device: str
    mac: bytes


def strike(
    origin: Strike, target: tuple[Namespace, IpAddress], sources: Sequence[IpAddress]
) -> list[IpAddress]:
    """Send one datagram from each source and say which arrived, in order.

    The last source must be one that passes: what did not come before it will not come.

    Raises:
        TimeoutError: the last one did not arrive.
    """
    namespace, address = target
    first = next(_payloads)
    frames = [
        _frame(origin, source, address, str(first).encode() + b"/" + str(number).encode())
        for number, source in enumerate(sources)
    ]
    found: list[IpAddress] = []
    with _bound(namespace, address, PORT) as server:
        with origin.namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((origin.device, 0))
            for data in frames:
                raw.send(data)
        while not found or found[-1] != sources[-1]:
            tag, _, number = server.recv(2048).partition(b"/")
            if tag == str(first).encode():
                found.append(sources[int(number)])
    return found


def hardware_address(namespace: Namespace, device: str) -> bytes:
    """The MAC address of a device."""
    with namespace.socket(socket.AF_PACKET, socket.SOCK_RAW) as probe:
        probe.bind((device, 0))
        mac: bytes = probe.getsockname()[4]
        return mac


def both(make: Namespace) -> None:
    """Forward in both families, as a node does, and check nothing in the kernel."""
    make.sysctl(
        {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1}
        | {f"net/ipv4/conf/{which}/rp_filter": 0 for which in ("all", "default")}
    )


def _bound(namespace: Namespace, address: IpAddress, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == FAMILIES[0] else socket.AF_INET6
    sock = namespace.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(_WAIT)
    sock.bind((str(address), port))
    return sock


def _frame(origin: Strike, source: IpAddress, target: IpAddress, payload: bytes) -> bytes:
    length = 8 + len(payload)
    head = struct.pack("!HHHH", 40000, PORT, length, 0)
    pseudo = source.packed + target.packed + struct.pack("!II", length, socket.IPPROTO_UDP)
    datagram = head[:6] + struct.pack("!H", checksum(pseudo + head + payload) or 0xFFFF) + payload
    make, ethertype = (ipv4, ETH_P_IP) if source.version == FAMILIES[0] else (ipv6, ETH_P_IPV6)
    own = hardware_address(origin.namespace, origin.device)
    return origin.mac + own + struct.pack("!H", ethertype) + make(str(source), str(target), datagram)
