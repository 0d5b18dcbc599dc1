# SPDX-License-Identifier: Apache-2.0
"""Two clients with the same addresses on two networks, and what they do at the same time."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tests.bpf.packets import checksum
from tools.lab import Backend, Lab, Network, network
from tools.lab.patience import PATIENCE
from tools.lab.topology import SERVICE_PORT, IpAddress
from tools.lab.traffic import family

ISOLATED = "    isolate_clients: true\n"
CLIENTS = ("client", "client2")
_PATIENCE_S = 10.0 * PATIENCE


def overlapping(count: int = 2) -> list[Network]:
    """Networks whose outside clients have one address, with the same VIPs everywhere."""
    return [network(0), *(network(n, same_clients=True, same_vips=True) for n in range(1, count))]


def each(policy: str, *extras: str) -> str:
    """A policy of isolated networks with more to say of each, in their order."""
    *parts, rest = policy.split(ISOLATED)
    return "".join(f"{part}{ISOLATED}{extra}" for part, extra in zip(parts, extras, strict=True)) + rest


def in_vrfs(policy: str) -> str:
    """A policy of two isolated networks, each in a VRF that it makes."""
    vrfs = (("red", 1001), ("blue", 1002))
    return each(
        policy, *(f"    vrf: {{name: {name}, table: {table}, create: true}}\n" for name, table in vrfs)
    )


@contextmanager
def both(
    lab: Lab, target: IpAddress, source: int, *, kind: int = socket.SOCK_STREAM, port: int = SERVICE_PORT
) -> Iterator[list[socket.socket]]:
    """A socket of each client from the same port to the same address, open at the same time."""
    with ExitStack() as stack:
        socks = []
        for client in CLIENTS:
            sock = stack.enter_context(lab[client].socket(family(target), kind))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.settimeout(_PATIENCE_S)
            sock.bind(("", source))
            sock.connect((str(target), port))
            socks.append(sock)
        yield socks


def fragments(target: IpAddress, client: IpAddress, port: int, fill: bytes) -> list[bytes]:
    """A datagram of 2,000 equal bytes in two IP packets that carry the same identification whoever sends it."""
    payload = fill * 2000
    header = struct.pack("!HHHH", 40500, port, 8 + len(payload), 0)
    if target.version == 6:
        pseudo = client.packed + target.packed + struct.pack("!II", 8 + len(payload), socket.IPPROTO_UDP)
        header = header[:6] + struct.pack("!H", checksum(pseudo + header + payload))
    whole = header + payload
    pieces = ((0, whole[:1400], True), (1400, whole[1400:], False))
    if target.version == 4:
        return [
            struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 7777, offset // 8 | more << 13, 64, 17, 0)
            + client.packed
            + target.packed
            + data
            for offset, data, more in pieces
        ]
    return [
        struct.pack("!IHBB", 6 << 28, 8 + len(data), 44, 64)
        + client.packed
        + target.packed
        + struct.pack("!BBHI", socket.IPPROTO_UDP, 0, offset | more, 7777)
        + data
        for offset, data, more in pieces
    ]


def datagrams_in_fragments(lab: Lab, version: int) -> set[bytes]:
    """What a socket of the node gets of two datagrams whose fragments come in turn, from both clients."""
    vip, port = lab.networks[0].vips[Backend.HOST_VIP].get(version), 4444
    with ExitStack() as stack:
        server = stack.enter_context(lab.node.socket(family(vip), socket.SOCK_DGRAM))
        server.bind((str(vip), port))
        server.settimeout(_PATIENCE_S)
        senders = [
            stack.enter_context(lab[client].socket(family(vip), socket.SOCK_RAW, socket.IPPROTO_RAW))
            for client in CLIENTS
        ]
        source = lab.networks[0].client.get(version)
        packets = [fragments(vip, source, port, fill) for fill in (b"A", b"B")]
        for turn in (0, 1):
            for sender, pieces in zip(senders, packets, strict=True):
                sender.sendto(pieces[turn], (str(vip), 0))
                # One after the other: they come by different routers.
                time.sleep(0.05)
        return {server.recv(4000) for _ in CLIENTS}
