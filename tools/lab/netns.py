# SPDX-License-Identifier: Apache-2.0
"""Network namespaces with names of our own, and ways to do something inside one.

Sockets are made by a thread that has entered the namespace (`setns(2)` is per thread) and can be used
from any thread afterwards. So the whole lab is one process: nothing to start, wait for or kill.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import operator
import os
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from tools.lab.links import waiting_devices
from tools.lab.patience import PATIENCE

T = TypeVar("T")

_RUN = Path("/var/run/netns")
#: The link watch looks at a hundred devices a second, of all namespaces: thousands of somebody else come first.
_SETTLED_S = 60 * PATIENCE
_CLONE_NEWNET = 0x40000000
_MS_BIND, _MNT_DETACH = 0x1000, 2
#: Commands of `ip` that take the family from the addresses that they are given, and IPv4 where there are none.
_WITH_ADDRESS = tuple(f"{what} {verb} " for what in ("addr", "route") for verb in ("add", "del", "replace"))
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
    # What `ip netns del` does. A lab has a dozen, and an emulated machine takes half a second to start a program.
    path = _RUN / name
    _libc.umount2(os.fsencode(path), _MNT_DETACH)
    with contextlib.suppress(OSError):
        path.unlink()


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
        if _RUN.is_mount():
            _thread(self._unshare)
        else:
            # The first of this machine: it makes the folder that all mount namespaces share.
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

    def _unshare(self) -> None:
        """What `ip netns add` does, in a thread that ends with it."""
        try:
            os.close(os.open(self.path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0))
        except OSError as error:
            raise LabError(f"{self.path}: {error.strerror}") from error
        own = b"/proc/thread-self/ns/net"
        if _libc.unshare(_CLONE_NEWNET) or _libc.mount(own, os.fsencode(self.path), b"none", _MS_BIND, None):
            error_text = os.strerror(ctypes.get_errno())
            remove(self.name)
            raise LabError(f"{self.name}: no network namespace: {error_text}")

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
        for option, group in itertools.groupby(map(_without_option, lines), key=operator.itemgetter(0)):
            # A batch has no options per line, so each run of lines of one family is a batch of its own.
            text = "".join(f"{line}\n" for _, line in group)
            self.run("ip", *([option] if option else []), "-batch", "-", stdin=text)

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

        def body() -> T:
            enter(self.name)
            return function()

        return _thread(body)

    def settle(self) -> None:
        """Wait until every device with a carrier takes packets, its addresses can be used, and one without shows it.

        Linux gives a new one its queue up to a second after its carrier (linkwatch), and drops what is sent before;
        an IPv6 address is tentative until the kernel's worker has looked at it, although nobody is asked here.

        Raises:
            LabError: one does not.
        """
        end = time.monotonic() + _SETTLED_S
        while waiting := self.call(waiting_devices):
            if time.monotonic() > end:
                raise LabError(f"{self.name}: {', '.join(waiting)} do not settle")
            time.sleep(0.03)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """Return a socket that lives in this namespace, whoever uses it."""
        return self.call(lambda: socket.socket(family, kind, protocol))


def _thread(function: Callable[[], T]) -> T:
    """Run a function in a thread of its own and return (or raise) what it does."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(function())
        except BaseException as error:  # noqa: BLE001  it is raised again, in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def _without_option(line: str) -> tuple[str, str]:
    """An option that names a family, and the command; none where an address of the command says it."""
    if not line.startswith("-"):
        return "", line
    option, command = line[:2], line[3:]
    if command.startswith(_WITH_ADDRESS) and (option == "-4" or ":" in command):
        return "", command
    return option, command


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
