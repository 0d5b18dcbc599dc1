# SPDX-License-Identifier: Apache-2.0
"""Many clients at once whose addresses and ports are the same on every network; each must get its own answers.

All TCP connections and UDP flows of a crowd are open at the same time. Each sends what nobody else sends, twice: an
answer that came to the wrong one of two equal clients shows.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import select
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import ip_address

from tools.lab import Backend, Lab, Network
from tools.lab.patience import PATIENCE
from tools.lab.topology import SERVICE_PORT, IpAddress
from tools.lab.traffic import family as family_of

PORT = 40123
_WAVE = 100
_PATIENCE_S = 30.0 * PATIENCE


@dataclass
class _Flow:
    name: str
    sock: socket.socket
    wanted: bytes
    request: bytes
    received: bytes = b""


@contextlib.contextmanager
def crowd(lab: Lab, clients: int) -> Iterator[None]:
    """Give every network's outside client the same further addresses, and this process enough descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    try:
        for network in lab.networks:
            role = network.role("client")
            lab[role].ip([f"addr add {address(f, n)} dev eth0" for f in (4, 6) for n in range(clients)])
            lab[network.role("router")].ip(
                [
                    f"route add {address(4, 0)}/24 dev to-{role}",
                    f"-6 route add {ip_address('2001:db8:cc::')}/64 dev to-{role}",
                ]
            )
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def address(version: int, number: int) -> IpAddress:
    """Of client `number`, on every network."""
    return ip_address(f"198.51.200.{number}" if version == 4 else f"2001:db8:cc::{number:x}")


def unserved(lab: Lab, backend: Backend, version: int, clients: int) -> list[str]:
    """Ask from all clients of all networks by TCP and UDP; who did not get both of his own answers."""
    failed: list[str] = []
    with ExitStack() as stack:
        flows: list[_Flow] = []
        for start in range(0, clients, _WAVE):
            numbers = range(start, min(clients, start + _WAVE))
            wave = [
                flow
                for network in lab.networks
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
                for flow in _open(lab, network, kind, network.vips[backend].get(version), numbers)
            ]
            for flow in wave:
                stack.callback(flow.sock.close)
            failed += [f"{flow.name}: first" for flow in _converse(wave)]
            flows += wave
        # Everybody is open now, and asks again, the last first.
        for flow in flows:
            flow.received = b""
        failed += [f"{flow.name}: again" for flow in _converse(flows[::-1])]
    return failed


def _open(
    lab: Lab, network: Network, kind: socket.SocketKind, target: IpAddress, numbers: Sequence[int]
) -> list[_Flow]:

    def make() -> list[_Flow]:
        flows = []
        for number in numbers:
            sock = socket.socket(family_of(target), kind)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(address(target.version, number)), PORT))
            with contextlib.suppress(BlockingIOError):
                sock.connect((str(target), SERVICE_PORT))
            name = f"{network.name}-{number}-{kind.name}"
            said = name.encode()
            if kind is socket.SOCK_STREAM:
                flows.append(_Flow(name, sock, b"%d\n" % zlib.crc32(said), b"up %d\n" % len(said) + said))
            else:
                flows.append(_Flow(name, sock, said, said))
        return flows

    return lab[network.role("client")].call(make)


def _converse(flows: Sequence[_Flow]) -> list[_Flow]:
    """Send once on each flow and wait for all answers; those without the right one."""
    poll = select.epoll()
    by_fd = {flow.sock.fileno(): flow for flow in flows}
    for fd in by_fd:
        poll.register(fd, select.EPOLLOUT)
    left = set(by_fd)
    end = time.monotonic() + _PATIENCE_S
    with poll:
        while left and time.monotonic() < end:
            for fd, events in poll.poll(0.5):
                if _step(by_fd[fd], poll, events):
                    left.discard(fd)
                    poll.unregister(fd)
    return [by_fd[fd] for fd in left]


def _step(flow: _Flow, poll: select.epoll, events: int) -> bool:
    """Go on with a flow; True once it has its answer."""
    try:
        if events & select.EPOLLOUT:
            flow.sock.send(flow.request)
            poll.modify(flow.sock.fileno(), select.EPOLLIN)
        elif events & select.EPOLLIN:
            data = flow.sock.recv(4096)
            if not data:
                poll.modify(flow.sock.fileno(), 0)
            flow.received += data
    except OSError as error:
        if error.errno != errno.EAGAIN:
            poll.modify(flow.sock.fileno(), 0)
    return flow.received == flow.wanted
