# SPDX-License-Identifier: Apache-2.0
"""Network namespaces with names of our own, and ways to do something inside one.

Sockets are made by a thread that has entered the namespace (`setns(2)` is per thread) and can be used
from any thread afterwards. So the whole lab is one process: nothing to start, wait for or kill.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import json
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from tools.lab.patience import PATIENCE

T = TypeVar("T")

_RUN = Path("/var/run/netns")
#: The link watch looks at a hundred devices a second, of all namespaces: thousands of somebody else come first.
_SETTLED_S = 60 * PATIENCE
_CLONE_NEWNET = 0x40000000
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_NAME = re.compile(r"^dp(?P<pid>\d+)x\d+-")
_sequence = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The lab could not be built or used; the text has the command and what it said."""


def new_prefix() -> str:
    """Return a name prefix that no other lab of any living process has: ``dp<pid>x<n>-``."""
    return f"dp{os.getpid()}x{next(_sequence)}-"


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def leftovers() -> list[str]:
    """Return the namespaces of labs whose process is gone."""
    names = sorted(p.name for p in _RUN.iterdir()) if _RUN.is_dir() else []
    return [n for n in names if (m := _NAME.match(n)) and not _alive(int(m["pid"]))]


def remove(name: str) -> None:
    """Delete a namespace; one that is gone already is fine."""
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def enter(name: str) -> None:
    """Move the calling thread into a namespace, for good: only for threads made for this.

    Raises:
        OSError: there is no such namespace.
    """
    fd = os.open(_RUN / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, _CLONE_NEWNET) != 0:
            errno = ctypes.get_errno()
            raise OSError(errno, os.strerror(errno), name)
    finally:
        os.close(fd)


class Namespace:
    """One network namespace.

    Attributes:
        name: as `ip netns` shows it.
        path: what `nsenter --net=` takes.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = str(_RUN / name)

    def create(self) -> None:
        """Make the namespace, with its loopback up.

        Raises:
            LabError: the name exists, or we may not.
        """
        _checked(["ip", "netns", "add", self.name], None)
        # An address is usable at once without duplicate address detection; the lab's are unique.
        self.sysctl(
            {
                "net/ipv6/conf/all/accept_dad": 0,
                "net/ipv6/conf/default/accept_dad": 0,
                "net/ipv6/conf/default/router_solicitations": 0,
                "net/ipv6/conf/default/accept_ra": 0,
            }
        )
        self.call(_loopback_up)

    def argv(self, *argv: str) -> list[str]:
        """Return the argument list that runs a program in here; /sys stays the host's."""
        return ["nsenter", f"--net={self.path}", *argv]

    def run(self, *argv: str, stdin: str | None = None) -> str:
        """Run a program in here to its end and return what it wrote to stdout.

        Raises:
            LabError: it failed; with its stderr.
        """
        # A process belongs to its starting thread's namespace: `nsenter` would be a second program to load each time,
        # which takes longer than most commands in an emulated machine.
        return self.call(lambda: _checked([*argv], stdin))

    def ip(self, lines: Iterable[str]) -> None:
        """Run `ip` commands (without the word `ip`), in order; ``-6 `` in front as on the command line.

        Raises:
            LabError: one of them failed; none after it was run.
        """
        for option, group in itertools.groupby(lines, key=lambda line: line.startswith("-") and line[:2]):
            # A batch has no options per line, so each run of lines of one family is a batch of its own.
            select, start = ([option], 3) if option else ([], 0)
            self.run("ip", *select, "-batch", "-", stdin="".join(f"{line[start:]}\n" for line in group))

    def nft(self, text: str) -> None:
        """Load nft commands in one transaction.

        Raises:
            LabError: they were refused.
        """
        self.run("nft", "-f", "-", stdin=text)

    def sysctl(self, values: Mapping[str, int | str]) -> None:
        """Write sysctls, named by their path under /proc/sys (device names have dots)."""

        def write() -> None:
            for key, value in values.items():
                Path("/proc/sys", key).write_text(str(value))

        self.call(write)

    def read_sysctl(self, key: str) -> str:
        """Return one sysctl, named by its path under /proc/sys."""
        return self.call(lambda: Path("/proc/sys", key).read_text().strip())

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in a thread inside the namespace and return (or raise) what it does."""
        result: list[T] = []
        failure: list[BaseException] = []

        def body() -> None:
            try:
                enter(self.name)
                result.append(function())
            except BaseException as error:  # noqa: BLE001  it is raised again, in the caller's thread
                failure.append(error)

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        thread.join()
        if failure:
            raise failure[0]
        return result[0]

    def settle(self) -> None:
        """Wait until every device with a carrier takes packets, and its addresses can be used.

        Linux gives a new one its queue up to a second after its carrier (linkwatch), and drops what is sent before;
        an IPv6 address is tentative until the kernel's worker has looked at it, although nobody is asked here.

        Raises:
            LabError: one does not.
        """
        end = time.monotonic() + _SETTLED_S
        while waiting := [link["ifname"] for link in self._links() if not _takes_packets(link)]:
            if time.monotonic() > end:
                raise LabError(f"{self.name}: {', '.join(waiting)} have a carrier and take no packets")
            time.sleep(0.01)

    def _links(self) -> list[dict[str, Any]]:
        links: list[dict[str, Any]] = json.loads(self.run("ip", "-d", "-j", "addr", "show", "up") or "[]")
        return links

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Return a socket that lives in this namespace, whoever uses it."""
        return self.call(lambda: socket.socket(family, kind, protocol))


def _takes_packets(link: Mapping[str, Any]) -> bool:
    if "LOWER_UP" not in link["flags"]:
        return True
    # Neither loopback nor dummy says that it is up.
    silent = "LOOPBACK" in link["flags"] or link.get("linkinfo", {}).get("info_kind") == "dummy"
    tentative = any(address.get("tentative") for address in link.get("addr_info", ()))
    return (silent or link["operstate"] == "UP") and not tentative


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock.fileno(), _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def _checked(argv: list[str], stdin: str | None) -> str:
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(
            f"{' '.join(argv)}: exit status {done.returncode}: {done.stderr.strip()}\n{stdin or ''}"
        )
    return done.stdout
