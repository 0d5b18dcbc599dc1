# SPDX-License-Identifier: Apache-2.0
"""Namespaces of their own for every test that touches devices or loads programs."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_NUMBERS = itertools.count()


def run(*command: str) -> str:
    """Standard output of a command that must succeed."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _enter(path: Path) -> None:
    with path.open() as file:
        if _LIBC.setns(file.fileno(), _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread, and the processes it starts, in that namespace."""
    with Path("/proc/thread-self/ns/net").open() as before:
        _enter(Path("/var/run/netns") / namespace)
        try:
            yield
        finally:
            _enter(Path(f"/proc/self/fd/{before.fileno()}"))


@contextlib.contextmanager
def new_namespace(purpose: str) -> Iterator[str]:
    """A named namespace with loopback up."""
    name = f"dp-bpf-{os.getpid()}-{next(_NUMBERS)}-{purpose}"
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        run("ip", "netns", "delete", name)


@pytest.fixture
def node() -> Iterator[str]:
    """The test runs inside a new namespace; its name."""
    with new_namespace("node") as name, inside(name):
        yield name


@pytest.fixture(scope="module")
def module_node() -> Iterator[str]:
    """The same for a whole module, where loading a program is the expensive part."""
    with new_namespace("node") as name, inside(name):
        yield name


@pytest.fixture
def exit_stack() -> Iterator[contextlib.ExitStack]:
    """What the test enters is left when it ends."""
    with contextlib.ExitStack() as stack:
        yield stack


class Wire:
    """The far end of the node's devices."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace

    def send(self, data: bytes, device: str = "wire0", times: int = 1) -> None:
        """Frames into the node."""
        with inside(self._namespace), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind((device, 0))
            for _ in range(times):
                raw.send(data)


@pytest.fixture
def wire(node: str) -> Iterator[Wire]:
    with new_namespace("wire") as far:
        # Or the far end's own neighbour discovery would be counted.
        run("ip", "netns", "exec", far, "sysctl", "-qw", "net.ipv6.conf.default.disable_ipv6=1")
        for number in range(2):
            run(
                "ip",
                "link",
                "add",
                f"trunk{number}",
                "type",
                "veth",
                "peer",
                "name",
                f"wire{number}",
                "netns",
                far,
            )
            run("ip", "link", "set", f"trunk{number}", "up", "address", "02:00:00:00:00:01")
            run("ip", "-n", far, "link", "set", f"wire{number}", "up")
        assert node
        yield Wire(far)
