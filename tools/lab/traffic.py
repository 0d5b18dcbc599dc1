# SPDX-License-Identifier: Apache-2.0
"""Flows that last: transfers, and pings that notice every single loss."""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
import zlib
from types import TracebackType
from typing import Self

from tools.lab import topology as topo
from tools.lab.lab import Lab
from tools.lab.patience import PATIENCE
from tools.lab.probe import echo_request
from tools.lab.servers import pattern
from tools.lab.topology import IpAddress

_PATIENCE = 10.0 * PATIENCE


def family(target: IpAddress) -> socket.AddressFamily:
    """Return the socket family of an address."""
    return socket.AF_INET if target.version == 4 else socket.AF_INET6


def connect(
    lab: Lab, role: str, target: IpAddress, *, seconds: float = _PATIENCE, port: int = topo.SERVICE_PORT
) -> socket.socket:
    """Return a TCP connection from a namespace.

    Raises:
        OSError: not within `seconds`.
    """
    sock = lab[role].socket(family(target), socket.SOCK_STREAM)
    sock.settimeout(seconds)
    try:
        sock.connect((str(target), port))
    except OSError:
        sock.close()
        raise
    return sock


def datagrams(
    lab: Lab, role: str, target: IpAddress, *, seconds: float = _PATIENCE, port: int = topo.SERVICE_PORT
) -> socket.socket:
    """Return a connected UDP socket of a namespace."""
    sock = lab[role].socket(family(target), socket.SOCK_DGRAM)
    sock.settimeout(seconds)
    sock.connect((str(target), port))
    return sock


def ask_line(sock: socket.socket, line: str) -> str:
    """Send one line on a TCP connection and return the answer's line.

    Raises:
        OSError: no answer, or the connection ended.
    """
    sock.sendall(line.encode() + b"\n")
    answer = b""
    while not answer.endswith(b"\n"):
        data = sock.recv(4096)
        if not data:
            raise ConnectionError("closed")
        answer += data
    return answer.decode().strip()


def download(sock: socket.socket, size: int) -> int:
    """Fetch `size` bytes and return their CRC-32.

    Raises:
        OSError: it stalled, or ended early.
    """
    sock.sendall(f"down {size}\n".encode())
    crc, left = 0, size
    while left:
        data = sock.recv(min(left, 1 << 16))
        if not data:
            raise ConnectionError(f"{left} of {size} bytes are missing")
        crc, left = zlib.crc32(data, crc), left - len(data)
    return crc


def upload(sock: socket.socket, size: int) -> int:
    """Send `size` bytes and return the CRC-32 that the server saw.

    Raises:
        OSError: it stalled, or ended early.
    """
    sock.sendall(f"up {size}\n".encode() + pattern(size))
    answer = b""
    while not answer.endswith(b"\n"):
        data = sock.recv(64)
        if not data:
            raise ConnectionError("closed before the answer")
        answer += data
    return int(answer)


class Background:
    """Runs `turn` again and again in a thread until the `with` block ends; a failure is kept for the caller.

    Attributes:
        turns: how often it has been done.
        error: what ended it early, if anything.
    """

    def __init__(self, *, pause_s: float = 0.0) -> None:
        self.turns = 0
        self._pause_s = pause_s
        self.error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def turn(self) -> None:
        """Do one piece of work."""
        raise NotImplementedError

    def finish(self) -> None:
        """Do what is left after the last turn."""

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.turn()
                self.turns += 1
                if self._pause_s:
                    self._stop.wait(self._pause_s)
        except Exception as error:  # noqa: BLE001  the caller asserts on it
            self.error = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=2 * _PATIENCE)
        self.finish()


class Transfer(Background):
    """A TCP connection that downloads and uploads without end, and compares every byte.

    Args:
        lab: where.
        role: of the client.
        target: who is asked.
        pause_s: between two turns.
        seconds: how long nothing may come.
    """

    SIZE = 1 << 18

    def __init__(
        self, lab: Lab, role: str, target: IpAddress, *, pause_s: float = 0.0, seconds: float = _PATIENCE
    ) -> None:
        super().__init__(pause_s=pause_s)
        self._sock = connect(lab, role, target, seconds=seconds)
        self._expected = zlib.crc32(pattern(self.SIZE))

    def turn(self) -> None:
        """A quarter of a MiB down, the same up."""
        for name, crc in (
            ("download", download(self._sock, self.SIZE)),
            ("upload", upload(self._sock, self.SIZE)),
        ):
            if crc != self._expected:
                raise ConnectionError(f"{name} is damaged")

    def finish(self) -> None:
        """Close the connection."""
        self._sock.close()


class Conversations(Background):
    """One connection after the other: connect, ask, close."""

    def __init__(self, lab: Lab, role: str, target: IpAddress, *, pause_s: float = 0.0) -> None:
        super().__init__(pause_s=pause_s)
        self._lab, self._role, self._target = lab, role, target

    def turn(self) -> None:
        """A whole connection."""
        with connect(self._lab, self._role, self._target) as sock:
            if '"source"' not in ask_line(sock, "who"):
                raise ConnectionError("answered something else")


class PingFlood(Background):
    """Echo requests every few milliseconds, with consecutive numbers, so that every lost or doubled one is known.

    Args:
        lab: where.
        role: of who asks.
        target: who is asked.
        ident: of all requests.
        last_s: how long to wait at the end for answers that are missing.

    Attributes:
        sent: how many.
        lost: the numbers of those without an answer, known after the `with` block.
    """

    INTERVAL = 0.002

    def __init__(
        self, lab: Lab, role: str, target: IpAddress, *, ident: int = 0x4C42, last_s: float = _PATIENCE
    ) -> None:
        super().__init__()
        self._last_s = last_s
        self._v4 = target.version == 4
        self._ident = ident
        proto = socket.IPPROTO_ICMP if self._v4 else socket.IPPROTO_ICMPV6
        self._sock = lab[role].socket(family(target), socket.SOCK_RAW, proto)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        self._sock.connect((str(target), 0))
        self.sent = 0
        self._answered: set[int] = set()
        self.lost: set[int] = set()

    def turn(self) -> None:
        """Send one and take what has come."""
        self._sock.send(
            echo_request(
                8 if self._v4 else 128, self._ident, self.sent & 0xFFFF, struct.pack("!I", self.sent)
            )
        )
        self.sent += 1
        self._take(self.INTERVAL)

    def finish(self) -> None:
        """Wait for the last answers, then say what is missing."""
        end = time.monotonic() + self._last_s
        while len(self._answered) < self.sent and time.monotonic() < end:
            self._take(0.05)
        self.lost = set(range(self.sent)) - self._answered
        self._sock.close()

    def _take(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and select.select([self._sock], [], [], left)[0]:
            data = self._sock.recv(65536)
            data = data[(data[0] & 15) * 4 :] if self._v4 else data
            if data[0] == (0 if self._v4 else 129) and data[4:6] == struct.pack("!H", self._ident):
                self._answered.add(struct.unpack("!I", data[8:12])[0])
