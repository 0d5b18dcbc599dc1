# SPDX-License-Identifier: Apache-2.0
"""One mutant: which test notices it first."""

from __future__ import annotations

import enum
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from datapath.kernel.bpf.source import bpf_directory
from tools.fuzz import corpus, replay
from tools.fuzz.build import build_replay
from tools.mutate import plugin
from tools.mutate.mutants import Mutant

_REPOSITORY: Final = Path(__file__).parents[2]
#: In the order of what kills most in the least time; of the tests of one mask after the other, one mask is enough.
_TESTS: Final = (
    "tests/bpf/test_differential.py",
    "tests/bpf/test_mutation_gaps.py",
    "tests/bpf/test_verdict.py",
    "tests/bpf/test_drops.py",
    "tests/bpf/test_mark.py",
)
#: The egress program has tests of its own, and shares only the reading of packets.
_STEERING: Final = ("tests/bpf/test_steering.py", "tests/bpf/test_steering_index.py")
_STEERING_FILES: Final = frozenset({"steering.bpf.c", "steer.h", "steering_index.h"})
_LEFT_OUT: Final = "not test_only_bits_inside_the_mask or 2779096485"
#: The same packets for every mutant, and few enough for a run over all of them.
_ENVIRONMENT: Final = {"DATAPATH_DIFFERENTIAL_PACKETS": "12000", "DATAPATH_DIFFERENTIAL_SEED": "20240229"}
_VARIATIONS: Final = 20_000
_TIMEOUT_S: Final = 200
_FAILED: Final = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


class Killer(enum.StrEnum):
    """What notices a mutant."""

    TEST = "test"
    REPLAY = "replay"
    COMPILER = "compiler"
    VERIFIER = "verifier"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Result:
    """The fate of a mutant.

    Attributes:
        test: the first test that failed, if one did.
    """

    mutant: Mutant | None
    killer: Killer
    test: str = ""


class CheckError(Exception):
    """The tests could not be run; the text is their output."""


def _run_tests(bpf: Path, tests: tuple[str, ...]) -> tuple[Killer, str]:
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "-p", plugin.__name__, "-k", _LEFT_OUT]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=_REPOSITORY,
        env={**os.environ, **_ENVIRONMENT, plugin.VARIABLE: str(bpf)},
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if result.returncode == 0:
        return Killer.NOBODY, ""
    if "it does not compile" in result.stdout:
        return Killer.COMPILER, ""
    if "the kernel refuses it" in result.stdout:
        return Killer.VERIFIER, ""
    failed = _FAILED.search(result.stdout)
    if failed is None:
        raise CheckError(result.stdout[-3000:] + result.stderr[-1000:])
    return Killer.TEST, failed.group(1)


def _survives_replay(bpf: Path, directory: Path, inputs: list[bytes], expected: list[str]) -> bool:
    program = build_replay(directory, bpf, sanitize=False)
    try:
        lines = replay.native(program, inputs)
    except replay.ReplayError:
        return False
    return all(map(replay.agrees, lines, expected))


class Checker:
    """Runs the tests against changed copies of bpf/."""

    def __init__(self) -> None:
        kept = corpus.read(corpus.CORPUS) + corpus.read(corpus.REGRESSIONS)
        self._inputs = kept + corpus.variations(kept, _VARIATIONS, seed=1)
        self._expected = [replay.expected(data) for data in self._inputs]

    def check(self, mutant: Mutant | None) -> Result:
        """The fate of one mutant; None is the unchanged program, which nobody must kill.

        Raises:
            CheckError: the tests could not be run.
            ValueError: the mutant does not fit the sources any more.
        """
        with tempfile.TemporaryDirectory(prefix="datapath-mutant-") as directory:
            bpf = Path(directory) / "bpf"
            shutil.copytree(bpf_directory(), bpf)
            if mutant is not None:
                mutant.apply(bpf)
            is_steering = mutant is not None and mutant.file in _STEERING_FILES
            killer, test = _run_tests(bpf, _STEERING if is_steering else _TESTS)
            if (
                killer is Killer.NOBODY
                and not is_steering
                and not _survives_replay(bpf, Path(directory), self._inputs, self._expected)
            ):
                killer = Killer.REPLAY
        return Result(mutant, killer, test)
