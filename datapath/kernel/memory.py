# SPDX-License-Identifier: Apache-2.0
"""The allocator of this process: give back what a large apply needed only for a moment."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return free memory to the kernel, where the C library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
