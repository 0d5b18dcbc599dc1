# SPDX-License-Identifier: Apache-2.0
"""Programs that run side by side, their output line by line with a name in front."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import IO, Final, Self

#: To put away what a program has started; then it is killed.
_GOODBYE_S: Final = 20.0


def run_together(commands: Mapping[str, list[str]]) -> int:
    """Run all to their end; 0 if each ended with 0. Whatever happens here ends them all."""
    with ExitStack() as stack:
        programs = [stack.enter_context(_Program(name, command)) for name, command in commands.items()]
        statuses = [program.process.wait() for program in programs]
    return 0 if not any(statuses) else 1


class _Program:
    def __init__(self, name: str, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None  # noqa: S101 - a pipe was asked for
        self._reader = threading.Thread(target=_show, args=(name, self.process.stdout))

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_GOODBYE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join()


def _show(name: str, lines: IO[str]) -> None:
    with lines:
        for line in lines:
            # In one piece, or two programs' lines mix.
            sys.stdout.write(f"{name:5} {line.rstrip()}\n")
            sys.stdout.flush()
