# SPDX-License-Identifier: Apache-2.0
"""All the flows of a lab at once, for as long as something is done to it, and what happened to each.

Datagrams and echoes are numbered one by one in a process of their own (`tools.lab.steady`). Transfers compare
their bytes; what TCP had to send again is read from the kernel's counters of every namespace, so that a loss that
TCP has healed is seen, too. What left the node by a wrong link is counted and dropped at the link's other end.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tools.lab.lab import Lab
from tools.lab.netns import LabError, Namespace
from tools.lab.patience import PATIENCE
from tools.lab.topology import (
    FAMILIES,
    SERVICE_PORT,
    VIP_BACKENDS,
    Backend,
    IpAddress,
    Network,
    backend_address,
)
from tools.lab.traffic import Background, Conversations, Transfer, family

_QUEUE_BYTES: Final = 8 << 20
#: Between two turns of a transfer: the machine's CPUs are for the change and for the numbered packets.
_PAUSES_S: Final = {"tcp": 0.03, "tcp-new": 0.1}
_STOP_TIMEOUT_S: Final = 30.0 * PATIENCE


@dataclass(frozen=True, slots=True)
class Flow:
    """Who asks what, how.

    Attributes:
        kind: ``udp``, ``icmp``, ``icmp-new`` (each echo is a connection of its own), ``tcp`` (a transfer that
            lasts) or ``tcp-new`` (one connection after the other).
        network: by name.
        client: a namespace role.
    """

    kind: str
    network: str
    client: str
    backend: Backend
    target: IpAddress

    def __str__(self) -> str:
        """Return a name for people."""
        return f"{self.kind} {self.client} -> {self.backend} {self.target}"


def all_flows(networks: Sequence[Network]) -> list[Flow]:
    """Return every client, kind of backend and family of these networks by numbered packets, and some by TCP."""
    flows = []
    for network in networks:
        for position, backend in enumerate(VIP_BACKENDS):
            for version in FAMILIES:
                target = network.vips[backend].get(version)
                clients = list(network.clients)
                flows += [
                    Flow(kind, network.name, client, backend, target)
                    for client in clients
                    for kind in ("udp", "icmp")
                ]
                # One client of each kind of backend: transfers need a thread each, and a new connection is an
                # entry of connection tracking for minutes.
                client = clients[position % len(clients)]
                flows += [
                    Flow(kind, network.name, client, backend, target)
                    for kind in ("icmp-new", "tcp", "tcp-new")
                ]
    return flows


@dataclass(slots=True)
class Outcome:
    """What happened to the flows.

    Attributes:
        packets: numbered requests that were sent.
        lost: of them, those without an answer; `lost_requests` did not even arrive (datagrams only).
        doubled: of them, those that were served or answered more than once.
        misrouted: packets that left the node by a wrong link, or came to a wrong server.
        resent: TCP segments that had to be sent again, `timeouts` of them after a pause without any answer.
        turns: pieces of work (a quarter MiB each way, or a whole connection) that TCP flows finished.
        machine: drops that are this machine's own: full queues of sockets and CPUs.
        failed: flows that ended, and numbered flows with losses; with the reason.
        lost_at: (time, flow) of some losses, by the system's monotonic clock.
    """

    packets: int = 0
    lost: int = 0
    lost_requests: int = 0
    doubled: int = 0
    misrouted: int = 0
    resent: int = 0
    timeouts: int = 0
    turns: int = 0
    machine: int = 0
    failed: list[str] = field(default_factory=list)
    lost_at: list[tuple[float, str]] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Nothing was lost, doubled, misrouted, resent or broken."""
        bad = self.lost, self.doubled, self.misrouted, self.resent, self.timeouts, len(self.failed)
        return self.packets > 0 and not any(bad)


class Traffic:
    """A context manager: all flows run inside of it, `outcome` says afterwards what happened.

    Args:
        lab: built with ``datagrams=False``; the datagrams' servers are here.
        flows: which.
        rate: numbered packets a second, of all flows together.
    """

    def __init__(self, lab: Lab, flows: Sequence[Flow], *, rate: int = 1500) -> None:
        self._lab = lab
        self._numbered = [flow for flow in flows if not flow.kind.startswith("tcp")]
        self._tcp = [flow for flow in flows if flow.kind.startswith("tcp")]
        self._rate = rate
        self._stack = ExitStack()
        self._background: list[tuple[Flow, Background]] = []
        self._process: subprocess.Popen[str]
        self._before: list[int] = []
        self.outcome = Outcome()

    def __enter__(self) -> Self:
        with self._stack:
            self._lab.reset_counters()
            for flow in self._tcp:
                kind = Transfer if flow.kind == "tcp" else Conversations
                started = kind(self._lab, flow.client, flow.target, pause_s=_PAUSES_S[flow.kind])
                self._background.append((flow, self._stack.enter_context(started)))
            self._start_numbered()
            self._before = _trouble(self._lab)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            answer = "" if value is not None else self._finish_numbered()
        if answer:
            self._judge(json.loads(answer))

    def wait_turns(self, seconds: float = 20.0 * PATIENCE) -> None:
        """Wait until every TCP flow has finished one more piece of work, or has failed."""
        before = [background.turns for _, background in self._background]
        end = time.monotonic() + seconds
        while time.monotonic() < end and any(
            background.turns == turns and background.error is None
            for (_, background), turns in zip(self._background, before, strict=True)
        ):
            time.sleep(0.005)

    def _start_numbered(self) -> None:
        places = self._lab.places()
        socks = [
            _bound(self._lab[role], address, port)
            for role, addresses, port in places
            for address in addresses
        ]
        served = [address for _, addresses, _ in places for address in addresses]
        job: dict[str, Any] = {
            "rate": self._rate,
            "servers": [sock.fileno() for sock in socks],
            "flows": [],
        }
        for number, flow in enumerate(self._numbered):
            sock = _asking(self._lab[flow.client], flow)
            socks.append(sock)
            server = served.index(_server(flow))
            job["flows"].append(
                {"fd": sock.fileno(), "kind": flow.kind, "ident": number * 601 & 0xFFFF, "server": server}
            )
        self._process = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-m", "tools.lab.steady"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=[sock.fileno() for sock in socks],
                cwd=Path(__file__).parents[2],
            )
        )
        self._stack.callback(self._process.kill)
        for sock in socks:
            self._stack.callback(sock.close)
        self._tell(json.dumps(job))
        if self._process.stdout is None or self._process.stdout.readline() != "started\n":
            raise LabError("tools.lab.steady did not start")

    def _tell(self, line: str) -> None:
        if self._process.stdin is None:
            raise LabError("tools.lab.steady is gone")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _finish_numbered(self) -> str:
        try:
            self._tell("stop")
            if self._process.stdout is None:
                raise LabError("tools.lab.steady has no output")
            return self._process.stdout.readline()
        finally:
            self._trouble = [
                after - before for before, after in zip(self._before, _trouble(self._lab), strict=True)
            ]

    def _judge(self, report: dict[str, Any]) -> None:
        out = self.outcome
        for flow, counted in zip(self._numbered, report["flows"], strict=True):
            out.packets += counted["sent"]
            out.lost += counted["lost"]
            out.lost_requests += counted["lost_requests"]
            out.doubled += counted["doubled"]
            out.lost_at += [(moment, str(flow)) for moment in counted["lost_at"]]
            if counted["lost"] or counted["doubled"]:
                out.failed.append(f"{flow}: {counted['lost']} of {counted['sent']} lost")
        for flow, background in self._background:
            out.turns += background.turns
            if background.error is not None:
                out.failed.append(f"{flow}: {background.error!r}")
            elif not background.turns:
                out.failed.append(f"{flow}: did nothing")
        resent, spurious, out.timeouts, cpu_drops = self._trouble
        out.resent = max(0, resent - spurious)
        out.machine = report["queue_drops"] + cpu_drops
        out.misrouted = report["elsewhere"] + self._lab.wrong_way()
        out.lost_at.sort()


def _server(flow: Flow) -> IpAddress:
    """Where its requests must arrive."""
    if flow.backend is Backend.HOST_VIP:
        return flow.target
    return backend_address(flow.backend).get(flow.target.version)


def _asking(namespace: Namespace, flow: Flow) -> socket.socket:
    if flow.kind == "udp":
        sock = namespace.socket(family(flow.target), socket.SOCK_DGRAM)
    else:
        protocol = socket.IPPROTO_ICMP if flow.target.version == 4 else socket.IPPROTO_ICMPV6
        sock = namespace.socket(family(flow.target), socket.SOCK_RAW, protocol)
    _widen(sock)
    sock.connect((str(flow.target), SERVICE_PORT if flow.kind == "udp" else 0))
    return sock


def _bound(namespace: Namespace, address: IpAddress, port: int) -> socket.socket:
    sock = namespace.socket(family(address), socket.SOCK_DGRAM)
    _widen(sock)
    sock.bind((str(address), port))
    return sock


def _widen(sock: socket.socket) -> None:
    """A loss must not be the receiver's; root may exceed the limit."""
    so_rcvbufforce = 33
    sock.setsockopt(socket.SOL_SOCKET, so_rcvbufforce, _QUEUE_BYTES)


def _trouble(lab: Lab) -> list[int]:
    """Segments sent again, of them without need, timeouts: of all namespaces; and packets that a CPU dropped."""
    totals = [0, 0, 0]
    for namespace in lab.namespaces():
        counters = namespace.call(_tcp_counters)
        totals[0] += counters["RetransSegs"]
        totals[1] += counters["TCPDSACKRecv"] + counters["TCPDSACKOfoRecv"]
        totals[2] += counters["TCPTimeouts"] - counters["TCPSpuriousRTOs"]
    softnet = Path("/proc/net/softnet_stat").read_text(encoding="ascii").splitlines()
    return [*totals, sum(int(line.split()[1], 16) for line in softnet)]


def _tcp_counters() -> dict[str, int]:
    """In the namespace's thread: /proc/net is that of the process."""
    found: dict[str, int] = {}
    for name in ("snmp", "netstat"):
        lines = Path("/proc/thread-self/net", name).read_text(encoding="ascii").splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=True):
            protocol, *keys = names.split()
            if protocol in ("Tcp:", "TcpExt:"):
                found |= dict(zip(keys, map(int, values.split()[1:]), strict=True))
    return found
