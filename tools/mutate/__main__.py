# SPDX-License-Identifier: Apache-2.0
"""python -m tools.mutate [--quick] [--file NAME]: change the eBPF program, one condition at a time; who notices?"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from tools.mutate.check import Checker, CheckError, Killer, Result
from tools.mutate.mutants import MUTANTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.mutate.mutants import Mutant

_QUICK: Final = 20
_NICE: Final = 10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.mutate", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"only {_QUICK} of the {len(MUTANTS)} mutants")
    parser.add_argument("--file", help="only mutants of this file below bpf/")
    parser.add_argument("--start", type=int, default=0, help="leave out the first ones")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> Sequence[Mutant]:
    chosen = [mutant for mutant in MUTANTS[arguments.start :] if arguments.file in {None, mutant.file}]
    if arguments.quick:
        # Evenly over all files; none that must survive.
        killable = [mutant for mutant in chosen if not mutant.equivalent]
        chosen = killable[:: max(1, len(killable) // _QUICK)][:_QUICK]
    return chosen


def _line(result: Result, mutant: Mutant) -> str:
    by = result.test.removeprefix("tests/") or result.killer
    return f"{mutant.file:14} {by:60.60} {mutant.title}"


def _summary(results: Sequence[tuple[Mutant, Result]]) -> str:
    """A table for docs/design/mutation.md: per file and killer."""
    killers = list(Killer)
    lines = [f"| file | mutants | {' | '.join(killers)} |", "|---|" + "---|" * (len(killers) + 1)]
    for file in [*dict.fromkeys(mutant.file for mutant, _ in results), ""]:
        counts = Counter(result.killer for mutant, result in results if file in {"", mutant.file})
        cells = " | ".join(str(counts[killer]) for killer in killers)
        lines.append(f"| {file or 'all'} | {counts.total()} | {cells} |")
    return "\n".join(lines)


def _run(mutants: Sequence[Mutant]) -> int:
    checker = Checker()
    untouched = checker.check(None)
    if untouched.killer is not Killer.NOBODY:
        print(f"mutate: the unchanged program fails: {untouched.killer} {untouched.test}", file=sys.stderr)
        return 1
    results = []
    for mutant in mutants:
        result = checker.check(mutant)
        results.append((mutant, result))
        print(_line(result, mutant), flush=True)
    survivors = [mutant for mutant, result in results if result.killer is Killer.NOBODY]
    print(_summary(results))
    for mutant in survivors:
        print(f"survived: {mutant.file}: {mutant.title}: {mutant.equivalent or 'NO TEST NOTICES IT'}")
    for mutant, result in results:
        if mutant.equivalent and result.killer is not Killer.NOBODY:
            print(f"not equivalent: {mutant.file}: {mutant.title}: {result.killer} {result.test}")
    return int(any(not mutant.equivalent for mutant in survivors))


def main() -> int:
    """0 if every mutant was killed that can be, 1 if not, 2 if the tests cannot be run."""
    os.nice(_NICE)
    started = time.monotonic()
    try:
        return _run(_chosen(_arguments()))
    except (CheckError, ValueError) as error:
        print(f"mutate: {error}", file=sys.stderr)
        return 2
    finally:
        print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
