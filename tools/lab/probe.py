# SPDX-License-Identifier: Apache-2.0
"""Asks what a cell says, and finds out which way the answer took."""

from __future__ import annotations

import itertools
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tools.lab import topology as topo
from tools.lab.cells import Cell, Proto, Way
from tools.lab.lab import Lab
from tools.lab.netns import enter
from tools.lab.observe import Seen
from tools.lab.patience import PATIENCE
from tools.lab.topology import Backend, IpAddress

_WORKERS = 48
_RESEND = 0.3 * PATIENCE
_echo_ids = itertools.count(os.getpid())
_SERVERS = {
    Backend.LOCAL_POD: "pod_a",
    Backend.REMOTE_POD: "pod_remote",
    Backend.HOST_VIP: "node",
    Backend.HOST_DNAT: "node",
    Backend.ELSEWHERE: "gw",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got.

    Attributes:
        served: the right server answered.
        source: the client's address as the server saw it; empty for ICMP and without an answer.
        error: why not, else empty.
    """

    served: bool
    source: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """One cell's outcome.

    Attributes:
        ok: served, and every packet took the expected way.
        ways: the ways on which packets of this flow left the node.
        detail: what is wrong, for people; the source that the server saw, if nothing is.
    """

    cell: Cell
    ok: bool
    ways: frozenset[Way]
    detail: str


def probe_all(lab: Lab, cells: Sequence[Cell], *, seconds: float = 1.0) -> list[ProbeResult]:
    """Run all cells at the same time and judge each.

    Args:
        lab: where.
        cells: what; two cells of one call must differ in client, target or protocol (two clients with one
            address, on two networks, are told apart).
        seconds: how long one answer may take on real hardware.
    """
    lab.by_gateway.reset()
    for counter in lab.by_vlan.values():
        counter.reset()
    with ThreadPoolExecutor(min(_WORKERS, len(cells) or 1), thread_name_prefix="probe") as pool:
        answers = list(pool.map(lambda cell: ask(lab, cell, seconds=seconds), cells))
    observed = _Observed(
        lab.by_gateway.read(),
        {name: counter.read() for name, counter in lab.by_vlan.items()},
        frozenset(_flow(lab, cell) for cell in cells if _to_vlan(cell)),
    )
    return [_judge(lab, cell, answer, observed) for cell, answer in zip(cells, answers, strict=True)]


def ask(lab: Lab, cell: Cell, *, seconds: float = 1.0) -> Answer:
    """Make one cell's request from the calling thread, which stays in the client's namespace: not the main thread."""
    if threading.current_thread() is threading.main_thread():
        raise RuntimeError("the main thread must not change its namespace")
    enter(lab[cell.client].name)
    seconds *= PATIENCE
    try:
        if cell.proto is Proto.ICMP:
            echo(cell.target, seconds=seconds, ident=cell.source_port)
            return Answer(served=True)
        reply = json.loads(_who(cell, seconds))
    except OSError as error:
        return Answer(served=False, error=str(error) or type(error).__name__)
    expected = _SERVERS[cell.backend]
    if reply["server"] != expected:
        return Answer(
            served=False, source=reply["source"], error=f"{reply['server']} answered instead of {expected}"
        )
    return Answer(served=True, source=reply["source"])


def _family(target: IpAddress) -> socket.AddressFamily:
    return socket.AF_INET if target.version == 4 else socket.AF_INET6


def _who(cell: Cell, seconds: float) -> bytes:
    kind = socket.SOCK_STREAM if cell.proto is Proto.TCP else socket.SOCK_DGRAM
    with socket.socket(_family(cell.target), kind) as sock:
        sock.settimeout(seconds)
        if cell.source_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", cell.source_port))
        sock.connect((str(cell.target), topo.SERVICE_PORT))
        if cell.proto is Proto.TCP:
            sock.sendall(b"who\n")
            with sock.makefile("rb") as lines:
                return lines.readline() or _raise("closed without an answer")
        return _resend(sock, b"who", seconds)


def _raise(text: str) -> bytes:
    raise OSError(text)


def _resend(sock: socket.socket, request: bytes, seconds: float) -> bytes:
    """Send a datagram until it is answered: the first one may be lost while neighbours are resolved."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        sock.send(request)
        sock.settimeout(min(_RESEND, left))
        try:
            return sock.recv(65536)
        except TimeoutError:
            continue
    raise TimeoutError("timed out")


def echo(target: IpAddress, *, seconds: float = 1.0, payload: bytes = b"datapath", ident: int = 0) -> None:
    """Ping once (with resends) from the calling thread's namespace; `ident` 0 takes one that nobody else has.

    Raises:
        OSError: no answer in time, or an error came back.
    """
    ident = ident or next(_echo_ids) & 0xFFFF
    v4 = target.version == 4
    kinds = (8, 0) if v4 else (128, 129)
    proto = socket.IPPROTO_ICMP if v4 else socket.IPPROTO_ICMPV6
    with socket.socket(_family(target), socket.SOCK_RAW, proto) as sock:
        sock.connect((str(target), 0))
        end, sequence = time.monotonic() + seconds, 0
        while (left := end - time.monotonic()) > 0:
            sequence += 1
            sock.send(echo_request(kinds[0], ident, sequence, payload))
            sock.settimeout(min(_RESEND, left))
            try:
                while True:
                    data = sock.recv(65536)
                    data = data[(data[0] & 15) * 4 :] if v4 else data
                    if data[0] == kinds[1] and data[4:6] == struct.pack("!H", ident):
                        return
            except TimeoutError:
                continue
    raise TimeoutError("timed out")


def echo_request(kind: int, ident: int, sequence: int, payload: bytes) -> bytes:
    """Return an ICMP (type 8, with checksum) or ICMPv6 (type 128, the kernel fills the checksum) echo request."""
    body = payload + b"\0" * (len(payload) % 2)
    message = struct.pack("!BBHHH", kind, 0, 0, ident, sequence) + body
    total = sum(struct.unpack(f"!{len(message) // 2}H", message))
    total = (total & 0xFFFF) + (total >> 16)
    return message[:2] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + message[4:]


@dataclass(frozen=True, slots=True)
class _Observed:
    """What left the node during a batch, and what of it on which VLAN some cell of the batch explains."""

    gateway: Sequence[Seen]
    vlans: dict[str, list[Seen]]
    explained: frozenset[tuple[str, str, str, Proto]]


def _flow(lab: Lab, cell: Cell) -> tuple[str, str, str, Proto]:
    """Return the network, source and destination of the answer to a client on a VLAN, and the protocol."""
    network = next(n for n in lab.networks if n.name == cell.network)
    return cell.network, str(cell.target), str(network.clients[cell.client].get(cell.family)), cell.proto


def _to_vlan(cell: Cell) -> bool:
    return cell.expect in (Way.ROUTER, Way.ON_LINK)


def _judge(lab: Lab, cell: Cell, answer: Answer, observed: _Observed) -> ProbeResult:
    judge = _ways_to_client if _to_vlan(cell) else _ways_from_inside
    ways, notes = judge(lab, cell, answer, observed)
    ok = answer.served and ways == {cell.expect} and not notes
    if answer.error:
        notes.insert(0, answer.error)
    if not ok:
        notes.append("left by " + (" and ".join(sorted(ways)) or Way.NOWHERE))
    return ProbeResult(cell, ok, frozenset(ways), "; ".join(notes) or answer.source)


def _ways_to_client(lab: Lab, cell: Cell, _answer: Answer, observed: _Observed) -> tuple[set[Way], list[str]]:
    ways: set[Way] = set()
    notes = []
    _, vip, client, _ = _flow(lab, cell)
    router = next(n for n in lab.networks if n.name == cell.network).role("router")
    router_mac = _mac(lab, router, "br-vlan")
    for name, seen in ((n, s) for n, entries in observed.vlans.items() for s in entries):
        if _is(seen, vip, client, cell.proto):
            if name == cell.network:
                ways.add(Way.ROUTER if seen.mac == router_mac else Way.ON_LINK)
            elif (name, vip, client, cell.proto) not in observed.explained:
                notes.append(f"left by the VLAN of {name}")
        elif cell.backend is not Backend.HOST_VIP:
            server = str(topo.backend_address(cell.backend).get(cell.family))
            if _is(seen, client, server, cell.proto):
                ways.add(Way.BOUNCED)
    if any(_is(s, vip, client, cell.proto) for s in observed.gateway):
        ways.add(Way.GATEWAY)
    return ways, notes


def _ways_from_inside(
    lab: Lab, cell: Cell, answer: Answer, observed: _Observed
) -> tuple[set[Way], list[str]]:
    ways: set[Way] = set()
    notes = []
    leaked = _leaks(lab, cell, observed.vlans)
    if leaked:
        ways.add(Way.ROUTER)
        notes.append(f"left by the VLAN: {leaked[0].source} > {leaked[0].destination}")
    if cell.expect is Way.GATEWAY:
        node = str(topo.NODE.get(cell.family))
        if any(_is(s, node, str(cell.target), cell.proto) for s in observed.gateway):
            ways.add(Way.GATEWAY)
        if answer.served and cell.proto is not Proto.ICMP and answer.source != node:
            notes.append(f"came from {answer.source} instead of {node}")
    elif answer.served and not leaked:
        ways.add(Way.INSIDE)
    return ways, notes


def _is(seen: Seen, source: str, destination: str, proto: Proto) -> bool:
    return (
        seen.source == source
        and seen.destination == destination
        and seen.protocol.removeprefix("ipv6-") == proto
    )


def _leaks(lab: Lab, cell: Cell, vlans: dict[str, list[Seen]]) -> list[Seen]:
    """Return what left by any VLAN and is not an answer to a client there: nothing of that kind ever may."""
    clients = {str(a) for n in lab.networks for p in n.clients.values() for a in p}
    return [
        s
        for seen in vlans.values()
        for s in seen
        if s.destination not in clients
        and s.protocol.removeprefix("ipv6-") == cell.proto
        and (":" in s.source) == (cell.family == 6)
    ]


def _mac(lab: Lab, role: str, device: str) -> str:
    return lab[role].call(lambda: _read_mac(device))


def _read_mac(device: str) -> str:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((device, 0))
        mac: bytes = sock.getsockname()[4]
        return mac.hex(":")
