# SPDX-License-Identifier: Apache-2.0
"""Namespaces of their own for every test that touches devices or loads programs."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
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
