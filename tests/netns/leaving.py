# SPDX-License-Identifier: Apache-2.0
"""What leaves a node, packet by packet and on every device; and connections that pods open all the time."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import socket
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Self

from tools.lab import Lab, traffic
from tools.lab.netns import Namespace
from tools.lab.servers import reset_on_close
from tools.lab.topology import SERVICE_PORT

_ETH_P_ALL: Final = 0x0003
_SO_RCVBUFFORCE: Final = 33
_SO_TIMESTAMPNS: Final = 35
_SOL_PACKET, _PACKET_STATISTICS = 263, 6
_OUTGOING: Final = 4
_ETHERTYPES: Final = {0x0800: 4, 0x86DD: 6}
_NO_PORTS: Final = frozenset({1, 58})


@dataclass(frozen=True, slots=True)
class Left:
    """One packet that left the node, and when, by the kernel's own clock (CLOCK_REALTIME)."""

    device: str
    source: str
    destination: str
    protocol: int
    source_port: int
    at_s: float


class Capture:
    """Every IP packet that leaves by some devices of a namespace. A context manager.

    The kernel's own copy, taken behind the last hook: what is here was sent.
    """

    def __init__(self, namespace: Namespace, devices: Iterable[str]) -> None:
        self._sockets = [namespace.call(functools.partial(_tap, device)) for device in devices]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(sock,)) for sock in self._sockets]
        self._packets: list[Left] = []
        #: What the kernel could not hand over: a test that missed packets proves nothing.
        self.missed = 0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.1)
        self._stop.set()
        for thread in self._threads:
            thread.join()
        for sock in self._sockets:
            _, dropped = struct.unpack("II", sock.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, 8))
            self.missed += dropped
            sock.close()

    def _read(self, sock: socket.socket) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(OSError):  # nothing came, or the device went down or away
                data, ancillary, _, (device, ethertype, kind, *_) = sock.recvmsg(256, 64)
                if kind == _OUTGOING and ethertype in _ETHERTYPES:
                    seconds, nanoseconds = struct.unpack("qq", ancillary[0][2])
                    self._packets.append(_parse(device, data, seconds + nanoseconds / 1e9))

    def to(self, destination: object) -> list[Left]:
        """What was sent to an address."""
        return [packet for packet in self._packets if packet.destination == str(destination)]

    def other_ways(self, right: set[tuple[str, str]], *destinations: object) -> list[Left]:
        """What reached somebody otherwise."""
        sent = [packet for to in destinations for packet in self.to(to)]
        return [packet for packet in sent if (packet.device, packet.source) not in right][:20]

    def ways(self, *destinations: object) -> set[tuple[str, str]]:
        """Devices and source addresses by which somebody was reached."""
        return {(packet.device, packet.source) for to in destinations for packet in self.to(to)}


def _tap(device: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 16 << 20)
    sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    sock.bind((device, _ETH_P_ALL))
    sock.settimeout(0.05)
    return sock


def _parse(device: str, data: bytes, at_s: float) -> Left:
    if data[0] >> 4 == 4:
        header = (data[0] & 15) * 4
        protocol, source, destination = data[9], data[12:16], data[16:20]
    else:
        header = 40
        protocol, source, destination = data[6], data[8:24], data[24:40]
    port = 0 if protocol in _NO_PORTS else int.from_bytes(data[header : header + 2], "big")
    return Left(
        device,
        str(ipaddress.ip_address(source)),
        str(ipaddress.ip_address(destination)),
        protocol,
        port,
        at_s,
    )


class Openers:
    """Pods that open a new connection every millisecond or so: datagrams, each from a port of its own.

    Attributes:
        opened: how many.
        answered: how many had their echo; known at the end.
        seen: source addresses that the server told.
    """

    def __init__(self, lab: Lab, pairs: Iterable[tuple[str, object]], *, port: int = 80) -> None:
        self._lab = lab
        self._pairs = [(role, str(target)) for role, target in pairs]
        self._port = port
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._open, args=pair) for pair in self._pairs]
        self.opened = 0
        self.answered = 0
        self.seen: set[str] = set()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _open(self, role: str, target: str) -> None:
        family = socket.AF_INET6 if ":" in target else socket.AF_INET

        def run() -> None:
            waiting: list[socket.socket] = []
            while not self._stop.is_set():
                sock = socket.socket(family, socket.SOCK_DGRAM)
                sock.setblocking(False)
                with contextlib.suppress(OSError):  # an ICMP error, or no route for a moment
                    sock.connect((target, self._port))
                    sock.send(b"who")
                    self.opened += 1
                waiting.append(sock)
                if len(waiting) > 150:
                    self._harvest(waiting.pop(0))
                time.sleep(0.001)
            time.sleep(0.3)
            for sock in waiting:
                self._harvest(sock)

        self._lab[role].call(run)

    def _harvest(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            self.seen.add(json.loads(sock.recv(200))["source"])
            self.answered += 1


def connect(lab: Lab, role: str, target: Any, *, port: int = SERVICE_PORT) -> socket.socket:
    """A TCP connection that is over once it is closed.

    Where its way is cut, the kernel would repeat its last segments for minutes: by then under another test's policy.
    """
    sock = traffic.connect(lab, role, target, port=port)
    reset_on_close(sock)
    return sock


@contextlib.contextmanager
def captured(lab: Lab) -> Iterator[Capture]:
    """All that leaves the lab's node to the outside."""
    devices = ["eth0", *(network.device for network in lab.networks)]
    with Capture(lab.node, devices) as capture:
        yield capture
    assert capture.missed == 0
