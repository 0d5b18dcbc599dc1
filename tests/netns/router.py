# SPDX-License-Identifier: Apache-2.0
"""The other end of a node's device: a router with servers, in a namespace of its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from tools.lab.netns import Namespace, new_prefix, remove

_PATIENCE_S = 10.0
_RATE_S = 0.005


class Router:
    """A namespace whose device ``uplink`` is the other end of a node's device."""

    def __init__(self, node: Namespace, device: str, *addresses: str) -> None:
        self.namespace = Namespace(f"{new_prefix()}gw")
        self.namespace.create()
        # The node's own end exists already or not; whichever it is, the pair is new.
        node.ip(
            [
                f"link add {device} type veth peer name uplink netns {self.namespace.name}",
                f"link set {device} up",
            ]
        )
        self.namespace.ip(["link set uplink up"])
        self.add(*addresses)
        for end in (node, self.namespace):
            end.settle()

    def add(self, *addresses: str, device: str = "uplink") -> None:
        for address in addresses:
            option = "-6 " if ":" in address else ""
            self.namespace.ip([f"{option}addr add {address} dev {device}"])

    def remove(self, address: str) -> None:
        option = "-6 " if ":" in address else ""
        self.namespace.ip([f"{option}addr del {address} dev uplink"])

    def close(self) -> None:
        remove(self.namespace.name)


@contextlib.contextmanager
def router(node: Namespace, device: str, *addresses: str) -> Iterator[Router]:
    """Make the device and the router behind it; both go at the end."""
    made = Router(node, device, *addresses)
    try:
        yield made
    finally:
        made.close()


def _listener(address: str, port: int) -> Callable[[], socket.socket]:
    def listen() -> socket.socket:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen()
        return sock

    return listen


@contextlib.contextmanager
def tcp_server(
    where: Namespace, address: str, port: int, answer: bytes = b"", *, drip_s: float = 0
) -> Iterator[list[str]]:
    """Accept, read a little, answer (byte by byte, if it drips) and close; the addresses of those who came."""
    listener = where.call(_listener(address, port))
    clients: list[str] = []

    def serve() -> None:
        while True:
            try:
                sock, peer = listener.accept()
            except OSError:
                return
            with sock, contextlib.suppress(OSError):
                clients.append(peer[0])
                sock.settimeout(_PATIENCE_S)
                sock.recv(4096)
                for part in [answer] if not drip_s else [bytes([byte]) for byte in answer]:
                    sock.sendall(part)
                    time.sleep(drip_s)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield clients
    finally:
        # Closing alone leaves the thread in accept(2).
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


class Flow:
    """Datagrams of a client to a VIP at a fixed rate, echoed by a socket on the node. A context manager.

    Attributes:
        sent: how many.
        lost: numbers of those without an echo; known at the end.
    """

    def __init__(self, node: Namespace, vip: str, client: Namespace, source: str) -> None:
        self.sent = 0
        self.lost: list[int] = []
        self._server = node.call(lambda: _datagrams(vip))
        self._client = client.call(lambda: _datagrams(source))
        self._echoed: set[int] = set()
        self._stop, self._over = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=part) for part in (self._echo, self._receive, self._send)]

    def _echo(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                data, peer = self._server.recvfrom(64)
                self._server.sendto(data, peer)

    def _receive(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                self._echoed.add(int.from_bytes(self._client.recv(64), "big"))

    def _send(self) -> None:
        while not self._stop.wait(_RATE_S):
            self._client.sendto(self.sent.to_bytes(8, "big"), self._server.getsockname())
            self.sent += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        deadline = time.monotonic() + _PATIENCE_S
        while len(self._echoed) < self.sent and time.monotonic() < deadline:
            time.sleep(0.01)
        self._over.set()
        for thread in self._threads:
            thread.join()
        self.lost = sorted(set(range(self.sent)) - self._echoed)
        self._server.close()
        self._client.close()


def _datagrams(address: str) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 0))
    sock.settimeout(0.2)
    return sock
