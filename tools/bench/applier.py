# SPDX-License-Identifier: Apache-2.0
"""Applies one policy after the other in its own namespace, as `datapath apply` does, without starting Python anew.

    nsenter --net=... python -m tools.bench.applier STATE_DIR [--wrong ORDER]

Reads names of policy files from stdin, one a line, and answers each with one line of JSON: the exit status, what was
said, and when the engine passed which of its points (seconds of the system's monotonic clock).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from datapath.cli import main as datapath
from datapath.points import listening
from tools.bench import wrong_orders
from tools.lab.lab import Lab
from tools.lab.netns import LabError

_ROOT: Final = Path(__file__).parents[2]


class Applier:
    """The parent's end. A context manager.

    Args:
        lab: in whose node the policies are applied.
        folder: for the state and the policy files.
        wrong: one of `wrong_orders.ORDERS`, to show that a wrong order is seen.

    Attributes:
        points: (time, what came next) of every operation so far.
        steps: how many operations the last apply needed.
    """

    def __init__(self, lab: Lab, folder: Path, *, wrong: str = "") -> None:
        self._folder = folder
        argv = lab.node.argv(sys.executable, "-m", "tools.bench.applier", str(folder / "state"))
        argv += ["--wrong", wrong] if wrong else []
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=_ROOT
        )
        self.points: list[tuple[float, str]] = []
        self.steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def apply(self, policy: str) -> None:
        """Put a policy text in force.

        Raises:
            LabError: it was refused; with what was said.
        """
        path = self._folder / "policy.yaml"
        path.write_text(policy, encoding="utf-8")
        if self._process.stdin is None or self._process.stdout is None:
            raise LabError("the applier has no pipes")
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise LabError(f"the applier ended\n{policy}")
        answer = json.loads(line)
        if answer["status"] != 0:
            raise LabError(f"{answer['said']}\n{policy}")
        self.points += [(moment, name) for moment, name in answer["points"]]
        self.steps = len(answer["points"])


def _note(points: list[tuple[float, str]], name: str) -> None:
    points.append((time.monotonic(), name))


def main() -> int:
    """Apply what stdin names until it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("state", type=Path)
    parser.add_argument("--wrong", choices=sorted(wrong_orders.ORDERS))
    arguments = parser.parse_args()
    if arguments.wrong:
        wrong_orders.install(arguments.wrong)
    for line in sys.stdin:
        points: list[tuple[float, str]] = []
        said = io.StringIO()
        with (
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            listening(partial(_note, points)),
        ):
            status = datapath(["apply", line.strip(), "--state-dir", str(arguments.state)])
            _note(points, "done")
        print(json.dumps({"status": status, "said": said.getvalue(), "points": points}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
