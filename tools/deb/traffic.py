# SPDX-License-Identifier: Apache-2.0
"""Traffic that never stops while things happen to the node: requests at a fixed rate, and what became of them.

Runs in the virtual machine: only the standard library. Every client is a thread in its namespace, and sockets stay in
the namespace they were made in. Each flow sends one request every INTERVAL_S: `kept` flows are one connection from
boot on, `new` ones a connection for every request, whose client repeats it as clients do.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

INTERVAL_S: Final = 0.25
_REPEAT_S: Final = 1.0
_REPEATS: Final = 4
#: Longer than any answer takes, and than all repeats.
GRACE_S: Final = _REPEAT_S * (_REPEATS + 1)
_CLONE_NEWNET: Final = 0x40000000
#: Of <linux/in.h>, <linux/in6.h> and <asm-generic/socket.h>; Python 3.11 does not name them.
_IP_FREEBIND: Final = 15
_IPV6_FREEBIND: Final = 78
_SO_RCVBUFFORCE: Final = 33
_ETH_P_ALL: Final = 3
_PAYLOAD: Final = struct.Struct("!II")


@dataclass(slots=True)
class Request:
    """One request.

    Attributes:
        flow: network, family, target and kind, such as `trunk IPv4 pod new`.
        sent_s: monotonic clock.
        answered_s: answer to the request itself; None for lost.
        saved: one of its repeats was answered.
    """

    flow: str
    sent_s: float
    answered_s: float | None = None
    saved: bool = False


def figures(requests: Iterable[Request]) -> dict[str, int]:
    """Count what became of requests.

    Returns:
        `sent`, `lost` (the request itself had no answer), `stuck` (nor had any repeat of a new flow), and of the worst
        flow `outage_ms`: from its first lost request to its next answered one, or the end.
    """
    flows: dict[str, list[Request]] = {}
    for request in sorted(requests, key=lambda item: item.sent_s):
        flows.setdefault(request.flow, []).append(request)
    everything = [request for flow in flows.values() for request in flow]
    lost = [request for request in everything if request.answered_s is None]
    return {
        "sent": len(everything),
        "lost": len(lost),
        "stuck": sum(1 for request in lost if request.flow.endswith(" new") and not request.saved),
        "outage_ms": round(1000 * max((_outage_s(flow) for flow in flows.values()), default=0.0)),
    }


def _outage_s(flow: list[Request]) -> float:
    longest, since = 0.0, None
    for request in flow:
        if request.answered_s is None:
            since = request.sent_s if since is None else since
        elif since is not None:
            longest, since = max(longest, request.sent_s - since), None
    if since is not None:
        longest = max(longest, flow[-1].sent_s + INTERVAL_S - since)
    return longest


def enter(namespace: str) -> None:
    """Move this thread to a namespace of `ip netns`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", namespace).open("rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}")


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    number: int
    repeat_s: float
    repeats: int = 0


class Client:
    """One namespace's client.

    Args:
        namespace: of `ip netns`.
        targets: name of the flow, own address, address that is asked.
        port: that is asked.
    """

    def __init__(self, namespace: str, targets: list[tuple[str, str, str]], port: int) -> None:
        self.requests: list[Request] = []
        self._namespace, self._targets, self._port = namespace, targets, port
        self._selector = selectors.DefaultSelector()
        self._waiting: dict[int, _Connection] = {}
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        enter(self._namespace)
        kept = [self._open(own, asked) for _, own, asked in self._targets]
        next_s = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= next_s:
                for (flow, own, asked), connection in zip(self._targets, kept, strict=True):
                    self._ask(connection, self._note(f"{flow} kept"))
                    self._ask_anew(f"{flow} new", own, asked)
                next_s = max(next_s + INTERVAL_S, now - INTERVAL_S)
                self._repeat()
            for key, _ in self._selector.select(max(0.0, next_s - time.monotonic())):
                self._receive(key.fileobj)

    def _open(self, own: str, asked: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in asked else socket.AF_INET
        made = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        made.bind((own, 0))
        made.connect((asked, self._port))
        self._selector.register(made, selectors.EVENT_READ)
        return made

    def _note(self, flow: str) -> int:
        self.requests.append(Request(flow, time.monotonic()))
        return len(self.requests) - 1

    def _ask(self, connection: socket.socket, number: int, repeat: int = 0) -> None:
        # An error of an earlier request is reported here; that one has no answer anyway.
        for _ in range(2):
            try:
                connection.send(_PAYLOAD.pack(number, repeat))
            except OSError:
                continue
            return

    def _ask_anew(self, flow: str, own: str, asked: str) -> None:
        connection = self._open(own, asked)
        number = self._note(flow)
        self._waiting[connection.fileno()] = _Connection(connection, number, time.monotonic() + _REPEAT_S)
        self._ask(connection, number)

    def _repeat(self) -> None:
        now = time.monotonic()
        for waiting in [item for item in self._waiting.values() if item.repeat_s <= now]:
            waiting.repeats += 1
            if waiting.repeats > _REPEATS:
                self._forget(waiting)
                continue
            waiting.repeat_s = now + _REPEAT_S
            self._ask(waiting.socket, waiting.number, waiting.repeats)

    def _forget(self, waiting: _Connection) -> None:
        del self._waiting[waiting.socket.fileno()]
        self._selector.unregister(waiting.socket)
        waiting.socket.close()

    def _receive(self, connection: Any) -> None:
        with contextlib.suppress(OSError):
            while True:
                number, repeat = _PAYLOAD.unpack(connection.recv(64))
                request = self.requests[number]
                if repeat:
                    request.saved = True
                else:
                    request.answered_s = time.monotonic()
                waiting = self._waiting.get(connection.fileno())
                if waiting is not None and waiting.number == number:
                    self._forget(waiting)
                    return


class EchoServer:
    """Sends every datagram back, from the address it was sent to.

    Args:
        namespace: of `ip netns`; None for that of the node.
        addresses: may come later.
        port: of all of them.
    """

    def __init__(self, namespace: str | None, addresses: list[str], port: int) -> None:
        self._namespace, self._addresses, self._port = namespace, addresses, port
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        if self._namespace is not None:
            enter(self._namespace)
        selector = selectors.DefaultSelector()
        for address in self._addresses:
            made = self._open(address)
            selector.register(made, selectors.EVENT_READ, made)
        while True:
            for key, _ in selector.select():
                connection: socket.socket = key.data
                with contextlib.suppress(OSError):
                    data, sender = connection.recvfrom(64)
                    connection.sendto(data, sender)

    def _open(self, address: str) -> socket.socket:
        is_ipv6 = ":" in address
        made = socket.socket(
            socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        )
        if is_ipv6:
            made.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
        else:
            made.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
        # An emulated machine may stand still for seconds: that is no loss.
        made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 4 << 20)
        made.bind((address, self._port))
        return made


@dataclass(slots=True)
class WrongWay:
    """Watches the uplink for what must leave by another device: packets with the address of a VIP.

    Attributes:
        seen: when, monotonic clock, and from which VIP.
    """

    device: str
    vips: frozenset[str]
    seen: list[tuple[float, str]] = field(default_factory=list)

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while not Path("/sys/class/net", self.device).exists():
            time.sleep(0.005)
        watch = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_ETH_P_ALL))
        watch.bind((self.device, _ETH_P_ALL))
        while True:
            # OSError: the device went down. IndexError, ValueError: no whole IP header.
            with contextlib.suppress(OSError, IndexError, ValueError):
                packet = watch.recv(128)
                source = packet[12:16] if packet[0] >> 4 == 4 else packet[8:24]
                address = str(ipaddress.ip_address(source))
                if address in self.vips:
                    self.seen.append((time.monotonic(), address))
