# SPDX-License-Identifier: Apache-2.0
"""`datapath run` in a namespace, its log read as it grows, ended by its pid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from tools.bench.finish_moving import hurried
from tools.lab.netns import Namespace

_END_S: Final = 60
_MOVE_TIMEOUT_S: Final = 900
_REST_TIMEOUT_S: Final = 120
#: Of a second: what polls of an idle daemon take.
_AT_REST_S: Final = 0.03


class DaemonError(Exception):
    """It ended, or did not say in time what it should; the text is the end of its log."""


class Daemon:
    """One process. A context manager."""

    def __init__(
        self,
        node: Namespace,
        policy: Path,
        state: Path,
        *arguments: str,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        argv = [sys.executable, "-m", "datapath", "run", str(policy), "--state-dir", str(state), *arguments]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                node.argv(*argv), stdout=file, stderr=file, env={**os.environ, **(environment or {})}
            )
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _text(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def wait_for(self, event: str, seconds: float, *, poll_s: float) -> None:
        """Until the log says so, from where the last wait ended.

        Raises:
            DaemonError: it ended, or too much time went by.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            found = self._text().find(f'"{event}"', self._read)
            if found >= 0:
                self._read = found + len(event)
                return
            if self._process.poll() is not None:
                break
            time.sleep(poll_s)
        raise DaemonError(f"the daemon never said {event}:\n{self._text()[-500:]}")

    @property
    def cpu_s(self) -> float:
        """Processor time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rest(self) -> None:
        """Until it has nothing to do: all devices are moved to tcx, and what follows a change is over.

        Raises:
            DaemonError: it ended, or it never has.
        """
        if len(self.events("programs_moving")) > len(self.events("programs_moved")):
            with hurried():
                self.wait_for("programs_moved", _MOVE_TIMEOUT_S, poll_s=0.5)
        deadline, used = time.monotonic() + _REST_TIMEOUT_S, -1.0
        while self.cpu_s - used > _AT_REST_S:
            if time.monotonic() > deadline:
                raise DaemonError("the daemon is never at rest")
            used = self.cpu_s
            time.sleep(1)

    def events(self, name: str) -> list[dict[str, Any]]:
        """All of that name so far."""
        documents = (json.loads(line) for line in self._text().splitlines() if line.startswith("{"))
        return [document for document in documents if document["event"] == name]
