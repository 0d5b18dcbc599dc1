# SPDX-License-Identifier: Apache-2.0
"""What `make test` leaves out for the sake of time, and `make test-full` does.

A test that samples says in its docstring what it leaves out, and why the rest shows the same.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

#: Asked for by `make test-full`.
FULL: Final = os.environ.get("DATAPATH_TEST_FULL") == "1"


def ends_of_runs(names: Sequence[str]) -> list[int]:
    """Positions that differ from the one before or after, such as the first and last of many equal map writes."""
    last = len(names) - 1
    return [
        number
        for number, name in enumerate(names)
        if FULL or number in (0, last) or names[number - 1] != name or names[number + 1] != name
    ]
