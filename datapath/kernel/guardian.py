# SPDX-License-Identifier: Apache-2.0
"""Commit-confirm: an apply that goes back by itself unless somebody says that it is good.

Whoever holds the clock must outlive the shell and the process that applied: a transient unit where systemd runs
this namespace, else a process of its own session. Where even that one is killed, the daemon takes over, or the next
`run` or `restore`; the state directory says until when.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from datapath.errors import DatapathError
from datapath.state import Pending, StateDirectory, current_netns

_SYSTEMD = Path("/run/systemd/system")
_START_TIMEOUT_S = 10
#: The guardian looks this often whether it was confirmed: it holds nothing while it sleeps.
_POLL_S = 0.5
#: So often the probes that worked are repeated; each of them takes its own time on top.
_PROBE_S = 2.0
#: Why a change goes back where no probe failed.
MISSED = "nobody confirmed it in time"


def boot_clock_s() -> float:
    """Seconds since boot, sleep included: a clock that no time daemon moves."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def is_overdue(pending: Pending, grace_s: float = 0.0) -> bool:
    """Whether it is too late to confirm a change, by at least so many seconds, or it is being undone already."""
    return bool(pending.reason) or boot_clock_s() >= pending.deadline_s + grace_s


def seconds_left(pending: Pending) -> float:
    """Until it is too late to confirm a change; not below 0."""
    return 0.0 if pending.reason else max(0.0, pending.deadline_s - boot_clock_s())


def start_guardian(directory: StateDirectory, pending: Pending, *, has_probes: bool) -> None:
    """Have the change undone at its deadline, whatever becomes of this process.

    Args:
        directory: whose state holds the change, and says when it was confirmed.
        pending: the change.
        has_probes: somebody must be there all the time to repeat them; else a timer is enough.

    Raises:
        DatapathError: nobody can be found to hold the clock; nothing was changed.
    """
    command = [sys.executable, "-P", "-m", "datapath", "rollback"]
    command += ["--unconfirmed", pending.token, "--state-dir", str(directory.path.absolute())]
    if _is_systemds_namespace():
        seconds = max(1, round(pending.deadline_s - boot_clock_s()))
        unit = ["systemd-run", f"--unit=datapath-confirm-{pending.token}", "--collect", "--quiet"]
        if has_probes:
            # Who kills it gets another one: the token and the deadline are in the state directory.
            unit += ["--property=Restart=on-failure"]
            command += ["--wait"]
        else:
            unit += [f"--on-active={seconds}", "--timer-property=AccuracySec=100ms"]
        done = subprocess.run(
            [*unit, *command],
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


def watch_until_deadline(
    directory: StateDirectory, token: str, failing: Callable[[tuple[str, ...]], str]
) -> str:
    """Wait until a pending change must be undone.

    Args:
        directory: whose state holds the change.
        token: of the change.
        failing: tries the probes of these names, and says what is wrong with the first that fails.

    Returns:
        why it must be undone; empty as soon as it is confirmed, replaced or gone.
    """
    probe_at_s = 0.0
    while True:
        pending = directory.load().pending
        if pending is None or pending.token != token:
            return ""
        now = boot_clock_s()
        if is_overdue(pending):
            return pending.reason or MISSED
        if pending.watched and now >= probe_at_s:
            reason = failing(pending.watched)
            if reason:
                return reason
            probe_at_s = boot_clock_s() + _PROBE_S
        time.sleep(min(seconds_left(pending), _POLL_S))


def new_pending(previous: int, seconds: float) -> Pending:
    """A pending change that goes back to generation `previous` (0: nothing) after `seconds`."""
    return Pending(os.urandom(6).hex(), previous, boot_clock_s() + seconds)
