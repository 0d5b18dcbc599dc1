# SPDX-License-Identifier: Apache-2.0
"""How the fake says no: with the kernel's error number."""

from __future__ import annotations

import os

from datapath.errors import KernelError


def refuse(operation: str, code: int) -> KernelError:
    """The error that the engine sees; raise it."""
    return KernelError(operation, os.strerror(code), errno=code)
