# SPDX-License-Identifier: Apache-2.0
"""tcpdump itself, as an operator starts it, and what its lines say."""

from __future__ import annotations

import re
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Self

from tools.lab.netns import Namespace
from tools.lab.patience import PATIENCE
from tools.lab.topology import IpAddress

_PATIENCE_S: Final = 10.0 * PATIENCE
#: So long nothing new is written: everything is.
_QUIET_S: Final = 0.1 * PATIENCE
#: With `-e` the tag stands in front; a port follows its address after a dot.
_LINE: Final = re.compile(
    r"(?:.*\bvlan (?P<vlan>\d+), )?.*?(?P<source>\S+) > (?P<target>[^\s,]+): (?P<what>Flags \[(?P<flags>\S+)\]|UDP)?"
)
#: Neighbours look for each other and for multicast listeners by themselves.
_NEIGHBOURS: Final = re.compile(r"(neighbor|router) (solicitation|advertisement)|multicast listener|: HBH ")


@dataclass(frozen=True, slots=True)
class Seen:
    """One line: a packet.

    Attributes:
        port: that it goes to; 0 where it is neither TCP nor UDP.
        opens: it is the first one of a TCP connection.
        vlan: its tag; 0 for none.
        line: as tcpdump wrote it.
    """

    source: IpAddress
    target: IpAddress
    port: int
    opens: bool
    vlan: int
    line: str


def read_line(line: str) -> Seen | None:
    """What a line says; None for neighbour discovery, and for what a packet of HTTP holds.

    Raises:
        ValueError: it is no line about a packet.
    """
    if not line or line[0].isspace() or _NEIGHBOURS.search(line):
        return None
    found = _LINE.match(line)
    if found is None:
        raise ValueError(line)
    has_port = found["what"] is not None
    source, target = found["source"], found["target"]
    if has_port:
        source, (target, _, port) = source.rpartition(".")[0], target.rpartition(".")
    return Seen(
        ip_address(source),
        ip_address(target),
        int(port) if has_port else 0,
        found["flags"] == "S",
        int(found["vlan"] or 0),
        line,
    )


class Tcpdump:
    """tcpdump on a device, from when the `with` block begins to its end. A context manager.

    Args:
        namespace: where.
        device: on which.
        expression: what is to be seen.
        options: more of tcpdump's own.
    """

    def __init__(
        self, namespace: Namespace, device: str, expression: str = "ip or ip6", *options: str
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._out, self._err = (Path(self._folder.name, name) for name in ("out", "err"))
        argv = ["tcpdump", "-l", "-n", "-t", "--immediate-mode", "-i", device, *options, expression]

        def start() -> subprocess.Popen[bytes]:
            with self._out.open("ab") as out, self._err.open("ab") as err:
                return subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

        # It belongs to the namespace of the thread that starts it.
        self._process = namespace.call(start)
        self._text = ""

    def __enter__(self) -> Self:
        end = time.monotonic() + _PATIENCE_S
        while "listening on" not in self._err.read_text():
            if self._process.poll() is not None or time.monotonic() > end:
                self._process.kill()
                raise AssertionError(f"tcpdump does not listen: {self._err.read_text()}")
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            before = -1
            while before != (before := self._out.stat().st_size):
                time.sleep(_QUIET_S)
            self._process.send_signal(signal.SIGINT)
            self._process.wait(_PATIENCE_S)
            self._text = self._out.read_text()
            # Who missed packets has not shown that there were no others.
            assert "\n0 packets dropped by kernel" in self._err.read_text(), self._err.read_text()
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait(_PATIENCE_S)
            self._folder.cleanup()

    @property
    def packets(self) -> list[Seen]:
        """All that was seen, without neighbour discovery."""
        return [seen for line in self._text.splitlines() if (seen := read_line(line)) is not None]
