# SPDX-License-Identifier: Apache-2.0
"""Commit-confirm: an apply that goes back by itself unless somebody says that it is good.

Whoever holds the clock must outlive the shell and the process that applied: a transient systemd timer where
systemd runs this namespace, else a process of its own session.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from datapath.errors import DatapathError
from datapath.state import Pending, StateDirectory, current_netns

_SYSTEMD = Path("/run/systemd/system")
_START_TIMEOUT_S = 10
#: The guardian looks this often whether it was confirmed: it holds nothing while it sleeps.
_POLL_S = 0.5


def boot_clock_s() -> float:
    """Seconds since boot, sleep included: a clock that no time daemon moves."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def start_guardian(directory: StateDirectory, pending: Pending) -> None:
    """Have the change undone at its deadline, whatever becomes of this process.

    Raises:
        DatapathError: nobody can be found to hold the clock; nothing was changed.
    """
    command = [sys.executable, "-P", "-m", "datapath", "rollback"]
    command += ["--unconfirmed", pending.token, "--state-dir", str(directory.path.absolute())]
    if _is_systemds_namespace():
        seconds = max(1, round(pending.deadline_s - boot_clock_s()))
        timer = ["systemd-run", f"--unit=datapath-confirm-{pending.token}", f"--on-active={seconds}"]
        done = subprocess.run(
            [*timer, "--timer-property=AccuracySec=100ms", "--collect", "--quiet", *command],
            capture_output=True,
            text=True,
            timeout=_START_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            raise DatapathError(f"no timer for --confirm: {done.stderr.strip()}", hint="nothing was changed")
        return
    try:
        subprocess.Popen(  # it is meant to outlive us
            [*command, "--wait"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise DatapathError(f"no guardian for --confirm: {error}", hint="nothing was changed") from error


def _is_systemds_namespace() -> bool:
    """Whether a unit of systemd would run in the namespace of this process."""
    if not _SYSTEMD.is_dir():
        return False
    try:
        return Path("/proc/1/ns/net").stat().st_ino == current_netns()
    except OSError:
        return False


def wait_for_deadline(directory: StateDirectory, token: str) -> bool:
    """Sleep until the deadline of a pending change.

    Returns:
        whether it is still unconfirmed then; False as soon as it is confirmed, replaced or gone.
    """
    while True:
        pending = directory.load().pending
        if pending is None or pending.token != token:
            return False
        left = pending.deadline_s - boot_clock_s()
        if left <= 0:
            return True
        time.sleep(min(left, _POLL_S))


def new_pending(previous: int, seconds: float) -> Pending:
    """A pending change that goes back to generation `previous` (0: nothing) after `seconds`."""
    return Pending(os.urandom(6).hex(), previous, boot_clock_s() + seconds)
