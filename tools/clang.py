# SPDX-License-Identifier: Apache-2.0
"""Runs the C compiler for the programs of the tools; those of the product are compiled by bcc."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

_TIMEOUT_S: Final = 120


class BuildError(Exception):
    """Something does not compile; the text is the compiler's."""


def build(arguments: Sequence[str], output: Path) -> Path:
    """Compile, and give back where the result is.

    Raises:
        BuildError: it does not compile.
    """
    done = subprocess.run(
        ["clang-14", *arguments, "-o", str(output)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise BuildError(done.stderr)
    return output
