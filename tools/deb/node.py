# SPDX-License-Identifier: Apache-2.0
"""Programs and files of the node, as the guest uses them. Runs in the virtual machine: only the standard library."""

from __future__ import annotations

import json
import os
import subprocess
import termios
import time
import tty
from pathlib import Path
from typing import Any, Final

#: The second serial port: the host reads it while the machine runs.
_RESULTS: Final = "/dev/ttyS1"
_EVENT_S: Final = 60.0
#: To start a program takes an emulated machine a tenth of a second.
_POLL_S: Final = 1.0


class ProgramError(Exception):
    """A program failed; the text is what it said."""


def sh(*argv: str, check: bool = True) -> str:
    """Run a program; its output.

    Raises:
        ProgramError: it failed, and `check` is set.
    """
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise ProgramError(f"{' '.join(argv)}: {done.returncode} {done.stdout}{done.stderr}")
    return done.stdout.strip()


def tell(**document: Any) -> None:
    """Tell the host, now: the machine may stop at any time."""
    print(json.dumps(document), flush=True)
    line = os.open(_RESULTS, os.O_WRONLY | os.O_NOCTTY)
    try:
        tty.setraw(line)
        rest = (json.dumps(document) + "\n").encode()
        while rest:
            rest = rest[os.write(line, rest) :]
        termios.tcdrain(line)
    finally:
        os.close(line)


def write(path: Path, text: str) -> None:
    """Write a file that a power cut does not take back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def wait_until_active(*units: str, timeout_s: float) -> bool:
    """Wait for units; False where they are not active in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        states = sh("systemctl", "is-active", *units, check=False).split()
        if states == ["active"] * len(units):
            return True
        time.sleep(_POLL_S)
    return False


def main_pid() -> str:
    """Process of the daemon; 0 for none."""
    return sh("systemctl", "show", "-P", "MainPID", "datapath")


def is_as_desired() -> bool:
    """What `datapath status` says; a repair may be under way, so it is asked more than once."""
    return any("no drift" in sh("datapath", "status", check=False) for _ in range(3))


def events(since: float) -> list[dict[str, Any]]:
    """Events in the daemon's log.

    Args:
        since: seconds of the wall clock.
    """
    lines = sh(
        *("journalctl", "-b", "-u", "datapath", "-o", "cat", "--no-pager", f"--since=@{since:.6f}"),
        check=False,
    ).splitlines()
    found = []
    for line in lines:
        try:
            document = json.loads(line)
        except ValueError:
            continue
        if isinstance(document, dict):
            found.append(document)
    return found


def wait_for_event(name: str, since: float) -> None:
    """Wait until the daemon has logged that event; whoever needs it looks for it afterwards."""
    deadline = time.monotonic() + _EVENT_S
    while name and time.monotonic() < deadline:
        if any(document.get("event") == name for document in events(since)):
            return
        time.sleep(_POLL_S)
