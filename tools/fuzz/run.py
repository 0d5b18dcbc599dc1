# SPDX-License-Identifier: Apache-2.0
"""One bounded run of libFuzzer."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.fuzz import corpus

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Beyond the time that the run was given: start, reading the corpus, a report.
_GRACE_S: Final = 60


@dataclass(frozen=True, slots=True)
class Limit:
    """When a run ends.

    Attributes:
        seconds: of fuzzing; with `runs` it is only an upper bound for the process.
        runs: inputs to try; None: as many as the time allows. Only these can be repeated.
    """

    seconds: int = 120
    runs: int | None = None

    @property
    def option(self) -> str:
        """For libFuzzer."""
        return f"-max_total_time={self.seconds}" if self.runs is None else f"-runs={self.runs}"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a run ended with.

    Attributes:
        crash: the input that broke the program, None if none did.
        report: of libFuzzer and the sanitizers.
        found: inputs that take a new way through the program.
    """

    crash: bytes | None
    report: str
    found: tuple[bytes, ...]


class FuzzError(Exception):
    """The fuzzer itself failed; the text is its last words."""


def fuzz(target: Path, inputs: Sequence[bytes], directory: Path, *, limit: Limit, seed: int) -> Finding:
    """Fuzz until the limit or the first crash.

    Args:
        target: of `build_target`.
        inputs: to begin with.
        directory: for inputs; an empty one.
        limit: when it ends.
        seed: of libFuzzer; not 0, which means the clock.

    Raises:
        FuzzError: it ended with neither result.
    """
    new = directory / "new"
    known = directory / "known"
    new.mkdir()
    corpus.unpack(inputs, known)
    options = [
        f"-seed={seed}",
        f"-max_len={corpus.MAX_BYTES}",
        f"-artifact_prefix={directory}/",
        "-timeout=10",
    ]
    result = subprocess.run(
        [str(target), *options, limit.option, str(new), str(known)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=limit.seconds + _GRACE_S,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    artifacts = [path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()]
    if result.returncode != 0 and not artifacts:
        raise FuzzError(result.stderr[-2000:])
    found = tuple(path.read_bytes() for path in sorted(new.iterdir()))
    return Finding(crash=artifacts[0] if artifacts else None, report=result.stderr, found=found)


def minimise(target: Path, inputs: Sequence[bytes], directory: Path) -> list[bytes]:
    """The fewest of these inputs that take every way through the program that all of them take.

    Raises:
        FuzzError: an input breaks the program.
    """
    everything, kept = directory / "everything", directory / "kept"
    kept.mkdir()
    corpus.unpack(inputs, everything)
    result = subprocess.run(
        [str(target), "-merge=1", f"-max_len={corpus.MAX_BYTES}", str(kept), str(everything)],
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
        check=False,
    )
    if result.returncode != 0:
        raise FuzzError(result.stderr[-2000:])
    return [path.read_bytes() for path in sorted(kept.iterdir())]
