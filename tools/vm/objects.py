# SPDX-License-Identifier: Apache-2.0
"""The eBPF programs that the machine's tests load, compiled out here in a second each instead of a minute.

The machine still compiles by itself what is missing, and one test compares (tests/vm/test_probe.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from datapath.kernel.bpf import Capacities, abi, compiler, objects
from datapath.kernel.bpf.source import Source, render

#: Masks and map sizes of the policies in tests/vm, and of the tests of the program itself.
_PRODUCT: Final = (
    (0x0FFF0000, Capacities(16, 16)),
    (0x0FFF0000, Capacities(32, 16)),
    (0xFF00, Capacities(16, 16)),
    (0xFF000000, Capacities(16, 128)),
)
_TEST_ENTRY: Final = Path("tests/bpf/entry.bpf.c")


def prepare(folder: Path) -> None:
    """Compile into a folder that the machine gets to see.

    Raises:
        KernelError: they do not compile, or this machine's kernel refuses them.
    """
    with _environment(folder):
        for mask, capacities in _PRODUCT:
            _compile(render(mask, capacities), abi.PROGRAM_NAME)
        entry = (Path(__file__).parents[2] / _TEST_ENTRY).resolve()
        _compile(render(0xFF00, Capacities(16, 16), entry=entry), "datapath_test")


def _compile(source: Source, function: str) -> None:
    programs, maps = compiler.compile_and_load(source, functions=[function], maps=abi.MAP_NAMES)
    for fd in (*programs, *maps):
        fd.close()


@contextlib.contextmanager
def _environment(folder: Path) -> Iterator[None]:
    os.environ[objects.ENVIRONMENT] = str(folder)
    try:
        yield
    finally:
        del os.environ[objects.ENVIRONMENT]
