# SPDX-License-Identifier: Apache-2.0
"""Which test files the machine has to read at all.

Emulated, importing every test takes longer than running the marked ones; out here it takes seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tools.vm.boot import REPOSITORY


class SelectionError(Exception):
    """The tests cannot be collected, or none is marked."""


def marked_files() -> list[str]:
    """The files that hold tests marked `vm`, relative to the repository, sorted.

    Raises:
        SelectionError: with what pytest said.
    """
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "vm", "-p", "no:cacheprovider"],
        cwd=REPOSITORY,
        # tests/vm is collected only when the first is set (tests/conftest.py), and what is for one kernel only with
        # the second (tests/sampling.py).
        env={**os.environ, "DATAPATH_VM_KERNEL": "to be booted", "DATAPATH_TEST_FULL": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        raise SelectionError(f"pytest cannot collect the tests marked `vm`:\n{result.stdout}{result.stderr}")
    return sorted({line.partition("::")[0] for line in result.stdout.splitlines() if "::" in line})
