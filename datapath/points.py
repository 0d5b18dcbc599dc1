# SPDX-License-Identifier: Apache-2.0
"""Points between two operations, where a crash or a refusal may fall.

The engine names every point itself as it passes, so a test can stop the process at each of them, or let the
operation that comes next fail, without a list that somebody has to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str], None]

_listener: Listener | None = None


def reached(name: str | Callable[[], str]) -> None:
    """Say that the operation `name` comes next. Does nothing unless somebody listens.

    Args:
        name: or what makes it, where that takes a while and comes by the thousand.
    """
    if _listener is not None:
        _listener(name if isinstance(name, str) else name())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` at every point; what it raises, the operation raises."""
    global _listener  # noqa: PLW0603  (one process applies at a time; it holds the lock)
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
