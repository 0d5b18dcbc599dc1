# SPDX-License-Identifier: Apache-2.0
"""What `make test` and `make test-vm` leave out for the sake of time, and `make test-full` does.

Emulated, a test takes ten times as long: some run on one of Debian's kernels only, `@pytest.mark.one_kernel("6.1")`.

A test that samples says in its docstring what it leaves out, and why the rest shows the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

import pytest

#: Asked for by `make test-full`.
FULL: Final = os.environ.get("DATAPATH_TEST_FULL") == "1"

#: What `uname -r` says in a machine of `make test-vm`; empty outside.
_RELEASE: Final = os.environ.get("DATAPATH_VM_KERNEL", "")


def is_for_another_kernel(item: pytest.Item) -> bool:
    """Whether this machine leaves a test to the one with another kernel."""
    series = [str(marker.args[0]) for marker in item.iter_markers("one_kernel")]
    return bool(_RELEASE) and not FULL and any(not _RELEASE.startswith(f"{name}.") for name in series)


def ends_of_runs(names: Sequence[str]) -> list[int]:
    """Positions that differ from the one before or after, such as the first and last of many equal map writes."""
    last = len(names) - 1
    return [
        number
        for number, name in enumerate(names)
        if FULL or number in (0, last) or names[number - 1] != name or names[number + 1] != name
    ]
