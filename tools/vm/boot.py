# SPDX-License-Identifier: Apache-2.0
"""One boot of one kernel, in which one pytest run takes place.

The guest sees this machine's files as a copy-on-write snapshot: what it writes stays in its memory, except in one
results folder. So a crash in there cannot hurt the repository.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO
from xml.etree import ElementTree as ET

from tools.vm.guest import MARKER, OBJECTS
from tools.vm.objects import prepare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tools.vm.kernels import KernelImage

REPOSITORY: Final = Path(__file__).parent.parent.parent
_MEMORY: Final = "3G"
_POLL_S: Final = 0.2
#: Of the kernel. 6.1 takes the HPET for its clock where processors are several, and each look at that one leaves the
#: emulated code; defences against a processor's speculation are costly there, and nothing speculates.
_PARAMETERS: Final = ("tsc=reliable", "mitigations=off")
#: Says that nothing is left out (tests/sampling.py).
_FULL: Final = "DATAPATH_TEST_FULL"
#: Kept back of the time limit for power on, imports and the report.
_BOOT_S: Final = 50.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one boot showed.

    Attributes:
        series: the kernel's series, such as "6.1".
        tests: how many tests ran or were skipped.
        bad: how many of them failed or had an error.
        skipped: how many were skipped.
        seconds: from power on to power off.
        problem: why there is no result to trust, or an empty string.
    """

    series: str
    tests: int
    bad: int
    skipped: int
    seconds: float
    problem: str

    @property
    def passed(self) -> bool:
        """Whether the run is complete, has tests, and all is well."""
        return not self.problem and self.tests > self.skipped and self.bad == 0


def run_tests(
    image: KernelImage, pytest_options: Sequence[str], *, results: Path, timeout_s: float
) -> Outcome:
    """Boot the image, run pytest in it, power it off.

    The output of pytest is shown while it comes; it and the guest's console stay in `results`.
    """
    results.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # Outside the repository: the guest has a copy-on-write layer over that one.
    with tempfile.TemporaryDirectory(prefix="datapath-vm-") as shared_name:
        shared = Path(shared_name)
        output = shared / "pytest.log"
        output.touch()
        prepare(shared / OBJECTS)
        prepared = set((shared / OBJECTS).iterdir())
        command = _vng_command(image, pytest_options, shared, timeout_s)
        with (
            (shared / "console.log").open("wb") as console,
            output.open(encoding="utf-8", errors="replace") as log,
        ):
            problem = _boot(command, _launcher(shared), console.fileno(), log, started + timeout_s)
        if missing := set((shared / OBJECTS).iterdir()) - prepared:
            # Each takes most of a minute in there.
            print(
                f"vm: {len(missing)} program(s) were compiled in the machine: tools/vm/objects.py misses them"
            )
        outcome = _read_outcome(image, shared, problem, time.monotonic() - started)
        for name in ("pytest.log", "console.log", "junit.xml"):
            source = shared / name
            (results / name).write_bytes(source.read_bytes() if source.exists() else b"")
    return outcome


def _vng_command(
    image: KernelImage, pytest_options: Sequence[str], shared: Path, timeout_s: float
) -> list[str]:
    # pytest stops by itself in time to say what failed; pulling the plug would lose that.
    in_time = f"--session-timeout={max(1, round(timeout_s - _BOOT_S))}"
    # The machine has an environment of its own.
    sampling = [f"{_FULL}={os.environ[_FULL]}"] if _FULL in os.environ else []
    guest = [
        "env",
        *sampling,
        sys.executable,
        "-m",
        "tools.vm.guest",
        str(shared),
        image.release,
        in_time,
        *pytest_options,
    ]
    return [
        str(Path(sys.executable).parent / "vng"),
        "--run",
        str(image.vmlinuz),
        # Emulation only: the lane must mean the same where there is no /dev/kvm.
        "--disable-kvm",
        # Else it waits for a virtiofsd that Debian 12 has in a form too old for it, and takes 9p then.
        "--force-9p",
        *(f"--append={parameter}" for parameter in _PARAMETERS),
        "--user=root",
        f"--memory={_MEMORY}",
        f"--cpus={os.cpu_count() or 1}",
        f"--cwd={REPOSITORY}",
        f"--overlay-rwdir={REPOSITORY}",
        f"--rwdir={shared}",
        "--verbose",
        "--exec",
        shlex.join(guest),
    ]


def _launcher(shared: Path) -> str:
    """A search path on which vng finds our `virtme-run` first."""
    folder = shared / "bin"
    folder.mkdir()
    script = folder / "virtme-run"
    script.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tools.vm.virtme "$@"\n', encoding="utf-8"
    )
    script.chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def _boot(command: list[str], search_path: str, console: int, log: TextIO, deadline: float) -> str:
    """Run the machine until it is off, copying its log; return what went wrong with the machine itself."""
    environment = {**os.environ, "PATH": search_path}
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=subprocess.STDOUT,
        # A session of its own, so that the emulator below vng can be ended together with it.
        start_new_session=True,
    ) as machine:
        try:
            while machine.poll() is None:
                _copy(log)
                if time.monotonic() > deadline:
                    return "not finished in time; powered off"
                time.sleep(_POLL_S)
        finally:
            if machine.poll() is None:
                os.killpg(machine.pid, signal.SIGKILL)
            _copy(log)
    return ""


def _copy(log: TextIO) -> None:
    sys.stdout.write(log.read())
    sys.stdout.flush()


def _read_outcome(image: KernelImage, shared: Path, problem: str, seconds: float) -> Outcome:
    tests = bad = skipped = 0
    status = shared / "status"
    report = shared / "junit.xml"
    if MARKER.exists():
        MARKER.unlink()
        problem = "the machine's writes reached this repository: the copy-on-write layer is missing"
    elif not problem and not status.exists():
        problem = "the machine went off before pytest ended: see console.log"
    elif not problem and not report.exists():
        problem = f"pytest left no report, exit status {status.read_text(encoding='utf-8')}"
    if report.exists() and report.stat().st_size:
        for suite in ET.parse(report).iter("testsuite"):  # noqa: S314 - written by our own run
            tests += int(suite.get("tests", "0"))
            bad += int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
            skipped += int(suite.get("skipped", "0"))
    if not problem and bad == 0 and status.read_text(encoding="utf-8") != "0":
        problem = f"pytest ended with status {status.read_text(encoding='utf-8')}"
    return Outcome(image.series, tests, bad, skipped, seconds, problem)
