# SPDX-License-Identifier: Apache-2.0
"""python -m tools.fuzz [--seconds N] [--keep]: fuzz the packet parser; what breaks it is kept as a regression."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from pathlib import Path
from typing import Final

from tools.clang import BuildError
from tools.fuzz import corpus, replay
from tools.fuzz.build import build_replay, build_target
from tools.fuzz.run import Finding, FuzzError, Limit, fuzz, minimise
from tools.fuzz.world import CONTROL_BYTES

_DEFAULT_SECONDS: Final = 300
_CORPUS_COMMENT: Final = (
    "Written by `python -m tools.fuzz --keep`: circumstances (tools/fuzz/world.py), then a frame."
)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument(
        "--seconds", type=int, default=_DEFAULT_SECONDS, help="how long (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of libFuzzer (default: another one each time)")
    parser.add_argument("--keep", action="store_true", help="add what was found to the corpus, minimised")
    return parser.parse_args()


def _keep_regression(data: bytes, why: str) -> None:
    with corpus.REGRESSIONS.open("a", encoding="utf-8") as file:
        file.write(f"{data.hex()}  # {why}\n")
    print(f"fuzz: {why}: kept in {corpus.REGRESSIONS.name}")


def _disagreements(program: Path, inputs: list[bytes]) -> list[bytes]:
    lines = replay.native(program, inputs)
    return [
        data
        for data, line in zip(inputs, lines, strict=True)
        if not replay.agrees(line, replay.expected(data))
    ]


def _report(finding: Finding, seed: int) -> int:
    if finding.crash is None:
        print(finding.report.splitlines()[-1])
        return 0
    print(finding.report[-6000:], file=sys.stderr)
    _keep_regression(finding.crash, f"crash, seed {seed}")
    return 1


def _run(arguments: argparse.Namespace, directory: Path) -> int:
    seed = arguments.seed or secrets.randbelow(2**31 - 1) + 1
    inputs = corpus.read(corpus.CORPUS) + corpus.read(corpus.REGRESSIONS)
    target, program = build_target(directory), build_replay(directory)
    print(f"fuzz: {len(inputs)} inputs, seed {seed}, {arguments.seconds} s", flush=True)
    work = directory / "work"
    work.mkdir()
    finding = fuzz(target, inputs, work, limit=Limit(seconds=arguments.seconds), seed=seed)
    status = _report(finding, seed)
    usable = [data for data in (*inputs, *finding.found) if len(data) >= CONTROL_BYTES]
    for data in _disagreements(program, usable):
        _keep_regression(data, f"not what the reference model says, seed {seed}")
        status = 1
    if arguments.keep and status == 0:
        kept = minimise(target, usable, work)
        corpus.write(corpus.CORPUS, kept, _CORPUS_COMMENT)
        print(f"fuzz: {len(kept)} inputs are the corpus now")
    return status


def main() -> int:
    """0 if nothing was found, 1 if something broke or disagreed, 2 if it could not be built or run."""
    arguments = _arguments()
    try:
        with tempfile.TemporaryDirectory(prefix="datapath-fuzz-") as directory:
            return _run(arguments, Path(directory))
    except (BuildError, FuzzError, replay.ReplayError) as error:
        print(f"fuzz: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
