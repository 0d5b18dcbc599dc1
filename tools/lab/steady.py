# SPDX-License-Identifier: Apache-2.0
"""Datagrams and echoes at a steady rate, each with a number: what is lost, doubled or served elsewhere is known.

One small process of its own sends, serves and receives, because the interpreter that builds the lab and moves
the transfers' bytes would be late. It is told what to do in one line of JSON on stdin, sends until the next
line, waits for what is under way and answers with one line:

    python -m tools.lab.steady      (started by `tools.lab.flows`, which passes the sockets on)
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from tools.lab.patience import PATIENCE
from tools.lab.probe import echo_request

#: Magic, flow, number. The reply carries the same.
_NUMBERED: Final = struct.Struct("!4sHI")
_MAGIC: Final = b"dpst"
_ECHO_HEADER: Final = 8
_BATCH: Final = 64
#: Later than this, the schedule starts anew: a process that had to wait for its CPU sends no burst.
_LATE_S: Final = 0.05
_LAST_ANSWERS_S: Final = 3.0 * PATIENCE
#: linux/socket.h and linux/sock_diag.h: what a socket's queue had no room for.
_SO_MEMINFO, _SK_MEMINFO_DROPS, _MEMINFO = 55, 8, struct.Struct("9I")
_BAD_MAX: Final = 20


@dataclass(slots=True)
class _Flow:
    """One client's numbered packets to one address.

    Attributes:
        kind: ``udp``; ``icmp`` with one identifier; ``icmp-new`` with another one each time, a connection each.
        server: which of the servers must get the requests; -1 where the kernel answers.
        sent: when each was sent, in seconds of the system's monotonic clock.
        requests: how often each was served.
        replies: how often each was answered.
    """

    number: int
    sock: socket.socket
    kind: str
    ident: int
    server: int
    sent: array[float] = field(default_factory=lambda: array("d"))
    requests: bytearray = field(default_factory=bytearray)
    replies: bytearray = field(default_factory=bytearray)
    errors: int = 0

    def send(self, now: float) -> None:
        number = len(self.sent)
        self.sent.append(now)
        self.requests.append(0)
        self.replies.append(0)
        text = _NUMBERED.pack(_MAGIC, self.number, number)
        if self.kind != "udp":
            ident = (self.ident + number * (self.kind == "icmp-new")) & 0xFFFF
            echo = 8 if self.sock.family == socket.AF_INET else 128
            text = echo_request(echo, ident, number & 0xFFFF, text)
        try:
            self.sock.send(text)
        except OSError:  # an ICMP error about an earlier one; this one was not sent
            self.errors += 1

    def take(self, data: bytes) -> None:
        """Count an answer."""
        if self.kind != "udp":
            data = data[(data[0] & 15) * 4 :] if self.sock.family == socket.AF_INET else data
            if data[0] != (0 if self.sock.family == socket.AF_INET else 129):
                return
            data = data[_ECHO_HEADER:]
        flow, number = _numbered(data)
        if flow == self.number and number < len(self.replies):
            self.replies[number] = min(255, self.replies[number] + 1)

    @property
    def is_complete(self) -> bool:
        return 0 not in self.replies

    def report(self) -> dict[str, Any]:
        served = self.kind != "udp" or 0 not in self.requests
        lost = [number for number, count in enumerate(self.replies) if count == 0]
        return {
            "sent": len(self.sent),
            "lost": len(lost),
            "lost_requests": 0 if served else self.requests.count(0),
            "doubled": sum(max(a, b) > 1 for a, b in zip(self.requests, self.replies, strict=True)),
            "errors": self.errors,
            "lost_at": [self.sent[number] for number in lost[:_BAD_MAX]],
        }


def _numbered(data: bytes) -> tuple[int, int]:
    """Flow and number; flow -1 for what is not ours."""
    if len(data) < _NUMBERED.size or data[:4] != _MAGIC:
        return -1, 0
    _, flow, number = _NUMBERED.unpack_from(data)
    return flow, number


class _Loop:
    def __init__(self, job: dict[str, Any]) -> None:
        self._interval = 1.0 / job["rate"]
        self._servers = [_adopt(fd) for fd in job["servers"]]
        self._flows = [
            _Flow(number, _adopt(flow["fd"]), flow["kind"], flow["ident"], flow["server"])
            for number, flow in enumerate(job["flows"])
        ]
        self.elsewhere = 0
        self.server_errors = 0
        self._poll = select.epoll()
        self._readers: dict[int, Callable[[], bool]] = {}
        for index, server in enumerate(self._servers):
            self._register(server, partial(self._serve, index))
        for flow in self._flows:
            self._register(flow.sock, partial(self._take, flow))
        self._poll.register(sys.stdin.fileno(), select.EPOLLIN)

    def _register(self, sock: socket.socket, reader: Callable[[], bool]) -> None:
        self._poll.register(sock.fileno(), select.EPOLLIN)
        self._readers[sock.fileno()] = reader

    def run(self) -> None:
        """Send in turn until stdin says that it is enough."""
        due, turn = time.monotonic(), 0
        while True:
            now = time.monotonic()
            if now >= due:
                self._flows[turn].send(now)
                turn = (turn + 1) % len(self._flows)
                due = due + self._interval if now - due < _LATE_S else now
            if not self._look(max(0.0, due - time.monotonic())):
                break
        end = time.monotonic() + _LAST_ANSWERS_S
        self._poll.unregister(sys.stdin.fileno())
        while time.monotonic() < end and not all(flow.is_complete for flow in self._flows):
            self._look(0.02)
        self._look(0.02)  # one that comes twice

    def _look(self, seconds: float) -> bool:
        """Handle what has come; False when stdin has something to say."""
        for number, event in self._poll.poll(seconds):
            if number == sys.stdin.fileno():
                return False
            if event & ~select.EPOLLIN:
                self._readers[number]()  # fetches the error, too
                continue
            for _ in range(_BATCH):
                if not self._readers[number]():
                    break
        return True

    def _serve(self, index: int) -> bool:
        try:
            data, peer = self._servers[index].recvfrom(2048)
            flow, number = _numbered(data)
            if 0 <= flow < len(self._flows) and number < len(self._flows[flow].requests):
                requests = self._flows[flow].requests
                requests[number] = min(255, requests[number] + 1)
                self.elsewhere += self._flows[flow].server != index
            self._servers[index].sendto(data, peer)
        except BlockingIOError:
            return False
        except OSError:  # an ICMP error about an earlier answer: whoever asked misses it, and says so
            self.server_errors += 1
        return True

    def _take(self, flow: _Flow) -> bool:
        try:
            flow.take(flow.sock.recv(2048))
        except BlockingIOError:
            return False
        except OSError:
            flow.errors += 1
        return True

    def report(self) -> dict[str, Any]:
        socks = [*self._servers, *(flow.sock for flow in self._flows)]
        return {
            "flows": [flow.report() for flow in self._flows],
            "elsewhere": self.elsewhere,
            "server_errors": self.server_errors,
            "queue_drops": sum(_drops(sock) for sock in socks),
        }


def _adopt(fd: int) -> socket.socket:
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


def _drops(sock: socket.socket) -> int:
    words: tuple[int, ...] = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size))
    return words[_SK_MEMINFO_DROPS]


def main() -> int:
    """Do one job."""
    loop = _Loop(json.loads(sys.stdin.readline()))
    print("started", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        loop.run()
    print(json.dumps(loop.report()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
