# SPDX-License-Identifier: Apache-2.0
"""The lab's servers: TCP and UDP at any address of any namespace, served by threads of this process.

TCP takes lines, as many as wanted on one connection: ``who`` answers who asked whom, ``down N`` sends N bytes,
``up N`` takes N bytes and answers their CRC-32. A UDP datagram ``who`` gets the same answer, any other comes back.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from functools import partial

from tools.lab.announce import Announcer
from tools.lab.netns import Namespace
from tools.lab.patience import PATIENCE
from tools.lab.topology import IpAddress

_CHUNK = bytes(range(256)) * 256
_HANG_UP_S = 10.0 * PATIENCE


def pattern_crc(size: int) -> int:
    """Return the CRC-32 of the `size` bytes that ``down`` sends."""
    crc, left = 0, size
    while left > 0:
        crc = zlib.crc32(_CHUNK[:left], crc)
        left -= len(_CHUNK)
    return crc


def pattern(size: int) -> bytes:
    """Return the bytes that ``down`` sends."""
    return (_CHUNK * (size // len(_CHUNK) + 1))[:size]


class Reactor:
    """One thread that waits for all the lab's sockets; a TCP connection gets a thread of its own."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = os.pipe()
        self._selector.register(self._wake_in, selectors.EVENT_READ, None)
        self._connections: set[socket.socket] = set()
        self._announcers: list[Announcer] = []
        self._lock = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="lab-reactor", daemon=True)
        self._thread.start()

    def announce(self, announcer: Announcer) -> None:
        """Serve an announcer's sockets."""
        self._announcers.append(announcer)
        for sock in announcer.sockets:
            self._register(sock, partial(announcer.answer, sock))

    def serve(
        self, namespace: Namespace, role: str, address: IpAddress, port: int, *, datagrams: bool = True
    ) -> None:
        """Serve TCP and UDP at an address, which must exist; both answer at once when this returns."""
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6

        def listen() -> socket.socket:
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(address), port))
            sock.listen(256)
            return sock

        def bind() -> socket.socket:
            sock = socket.socket(family, socket.SOCK_DGRAM)
            sock.bind((str(address), port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            return sock

        tcp = namespace.call(listen)
        tcp.setblocking(False)
        self._register(tcp, partial(self._accept, tcp, role))
        if datagrams:
            udp = namespace.call(bind)
            udp.setblocking(False)
            self._register(udp, partial(_datagram, udp, role))

    def hang_up(self) -> None:
        """Reset every TCP connection, so that nothing is left which the kernel would send again later.

        Raises:
            TimeoutError: one does not end.
        """
        with self._lock:
            for connection in self._connections:
                reset_on_close(connection)
                _shut(connection)
            if not self._lock.wait_for(lambda: not self._connections, _HANG_UP_S):
                raise TimeoutError(f"{len(self._connections)} connection(s) do not end")

    def close(self) -> None:
        """Close every socket and end the threads."""
        self._stopping = True
        os.write(self._wake_out, b"x")
        self._thread.join(timeout=5)
        with self._lock:
            for connection in self._connections:
                _shut(connection)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._selector.close()
        os.close(self._wake_in)
        os.close(self._wake_out)

    def _register(self, sock: socket.socket, handler: Callable[[], None]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, handler)
        os.write(self._wake_out, b"r")

    def _loop(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                if key.data is None:
                    os.read(self._wake_in, 4096)
                else:
                    key.data()

    def _accept(self, listener: socket.socket, role: str) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # the client is gone again
            return
        connection.setblocking(True)
        with self._lock:
            self._connections.add(connection)
        threading.Thread(target=self._converse, args=(connection, role), daemon=True).start()

    def _converse(self, connection: socket.socket, role: str) -> None:
        try:
            with connection, connection.makefile("rb") as lines:
                while line := lines.readline():
                    command, _, argument = line.decode().strip().partition(" ")
                    if command == "down":
                        connection.sendall(pattern(int(argument)))
                    elif command == "up":
                        crc, left = 0, int(argument)
                        while left and (data := lines.read1(min(left, 1 << 16))):
                            crc, left = zlib.crc32(data, crc), left - len(data)
                        connection.sendall(f"{crc}\n".encode())
                    else:
                        connection.sendall(_who(role, connection.getpeername()))
        except (OSError, ValueError):  # reset, or closed under us at the end of the lab
            return
        finally:
            with self._lock:
                self._connections.discard(connection)
                self._lock.notify_all()


def reset_on_close(connection: socket.socket) -> None:
    """Let closing a TCP socket be its end: without this the kernel repeats what was not confirmed for a minute."""
    with contextlib.suppress(OSError):  # closed by its own thread a moment ago
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _shut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed by its own thread a moment ago
        return


def _who(role: str, peer: tuple[str, int]) -> bytes:
    return json.dumps({"server": role, "source": peer[0], "port": peer[1]}).encode() + b"\n"


def _datagram(sock: socket.socket, role: str) -> None:
    try:
        data, peer = sock.recvfrom(65536)
        sock.sendto(_who(role, peer) if data.startswith(b"who") else data, peer)
    except OSError:  # an ICMP error about an earlier answer: the prober sees that something is missing
        return
