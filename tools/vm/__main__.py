# SPDX-License-Identifier: Apache-2.0
"""python -m tools.vm [--kernel SERIES]... [-- PYTEST-OPTION...]: the tests marked `vm` on Debian's kernels."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Final

from tools.vm.boot import REPOSITORY, Outcome, run_tests
from tools.vm.kernels import SERIES, KernelError, KernelImage, fetch
from tools.vm.selection import SelectionError, marked_files
from tools.vm.together import run_together

_CACHE: Final = REPOSITORY / ".cache" / "vm"
#: A guard, not a measure: a machine that others use takes three times as long.
_TIMEOUT_S: Final = 2100.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.vm", description=__doc__)
    parser.add_argument(
        "--kernel", action="append", choices=list(SERIES), help="only this series (default: all)"
    )
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT_S, help="seconds for each boot (default: %(default)s)"
    )
    parser.add_argument("pytest_options", nargs="*", help="instead of '-q -m vm'")
    return parser.parse_args()


def _line(outcome: Outcome) -> str:
    passed = outcome.tests - outcome.bad - outcome.skipped
    text = (
        f"Linux {outcome.series:5} {passed} passed, {outcome.bad} failed, {outcome.skipped} skipped "
        f"in {outcome.seconds:.0f} s"
    )
    return f"{text}: {outcome.problem}" if outcome.problem else text


def _boot_each(images: list[KernelImage], options: list[str], timeout_s: float) -> int:
    outcomes = []
    for image in images:
        print(f"vm: booting Linux {image.release} without KVM", flush=True)
        results = _CACHE / "results" / image.series
        outcomes.append(run_tests(image, options, results=results, timeout_s=timeout_s))
        if not outcomes[-1].passed:
            print(f"vm: console and report are in {results.relative_to(REPOSITORY)}")
    print("\n".join(_line(outcome) for outcome in outcomes))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


def main() -> int:
    """Boot each kernel once; 0 if every test passed on every kernel."""
    # Ended from outside (a CI's time limit), the machine must be ended, too: raise, so that boot.py cleans up.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    arguments = _arguments()
    try:
        images = [fetch(series, _CACHE / "kernels") for series in arguments.kernel or SERIES]
        options = arguments.pytest_options or ["-q", "-m", "vm", *marked_files()]
    except (KernelError, SelectionError) as error:
        print(f"vm: {error}", file=sys.stderr)
        return 1
    if len(images) > 1 and (os.cpu_count() or 1) > 1:
        # Emulated, each keeps little more than one processor busy.
        program = [sys.executable, "-m", "tools.vm", "--timeout", str(arguments.timeout)]
        return run_together(
            {image.series: [*program, "--kernel", image.series, "--", *options] for image in images}
        )
    return _boot_each(images, options, arguments.timeout)


if __name__ == "__main__":
    sys.exit(main())
