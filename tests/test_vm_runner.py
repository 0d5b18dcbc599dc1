# SPDX-License-Identifier: Apache-2.0
"""The runner of `make test-vm` never takes a machine that broke for one that passed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.service.daemon import wait_until
from tools.vm import boot
from tools.vm.guest import MARKER
from tools.vm.kernels import KernelImage
from tools.vm.selection import marked_files
from tools.vm.together import run_together

_IMAGE = KernelImage("6.1", "6.1.0-0-amd64", Path("nowhere"))
_SUITE = '<testsuite tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"/>'


def _results(folder: Path, *, status: str | None = "0", **counts: int) -> boot.Outcome:
    if status is not None:
        (folder / "status").write_text(status)
    if counts:
        numbers = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0, **counts}
        (folder / "junit.xml").write_text(_SUITE.format(**numbers))
    return boot._read_outcome(_IMAGE, folder, "", 1.0)


def test_a_complete_run_passes(tmp_path: Path) -> None:
    outcome = _results(tmp_path, tests=5, skipped=1)
    assert outcome.passed
    assert (outcome.tests, outcome.bad, outcome.skipped) == (5, 0, 1)


@pytest.mark.parametrize("counts", [{"failures": 1}, {"errors": 1}], ids=str)
def test_failures_and_errors_fail(tmp_path: Path, counts: dict[str, int]) -> None:
    assert not _results(tmp_path, status="1", tests=5, **counts).passed


def test_a_run_without_tests_fails(tmp_path: Path) -> None:
    assert not _results(tmp_path, status="5", tests=0).passed


def test_a_run_of_only_skips_fails(tmp_path: Path) -> None:
    assert not _results(tmp_path, tests=3, skipped=3).passed


def test_a_machine_that_stops_early_fails(tmp_path: Path) -> None:
    outcome = _results(tmp_path, status=None, tests=5)
    assert not outcome.passed
    assert "before pytest ended" in outcome.problem


def test_a_status_that_contradicts_the_report_fails(tmp_path: Path) -> None:
    assert not _results(tmp_path, status="3", tests=5).passed


def test_writes_that_reach_the_repository_fail(tmp_path: Path) -> None:
    MARKER.touch()
    outcome = _results(tmp_path, tests=5)
    assert "copy-on-write" in outcome.problem
    assert not MARKER.exists()


def test_output_is_shown_and_a_machine_that_hangs_is_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, identity = tmp_path / "log", tmp_path / "pid"
    machine = (
        "import os, sys, time\n"
        f"open({str(log)!r}, 'a').write('a test ran')\n"
        f"open({str(identity)!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    log.touch()
    with (tmp_path / "console").open("wb") as console, log.open() as stream:
        deadline = time.monotonic() + 3
        command = [sys.executable, "-c", machine]
        problem = boot._boot(command, os.environ["PATH"], console.fileno(), stream, deadline)
    assert "not finished in time" in problem
    assert "a test ran" in capsys.readouterr().out
    with pytest.raises(ProcessLookupError):
        os.kill(int(identity.read_text()), 0)


def test_vng_finds_our_virtme_run_first(tmp_path: Path) -> None:
    found = shutil.which("virtme-run", path=boot._launcher(tmp_path))
    assert found == str(tmp_path / "bin" / "virtme-run")
    # What it runs needs virtme-ng, which only `make test-vm` installs: the lane itself shows that it works.
    assert "tools.vm.virtme" in Path(found).read_text(encoding="utf-8")


def test_the_machine_reads_only_files_with_marked_tests() -> None:
    files = marked_files()
    assert "tests/vm/test_probe.py" in files
    assert "tests/test_vm_runner.py" not in files


def _collected(environment: dict[str, str]) -> set[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "vm",
        "-p",
        "no:cacheprovider",
        "tests/vm",
    ]
    done = subprocess.run(
        command,
        cwd=boot.REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_what_one_kernel_leaves_out_another_one_runs() -> None:
    older, newer = (
        _collected({"DATAPATH_VM_KERNEL": release, "DATAPATH_TEST_FULL": ""})
        for release in ("6.1.0-56-amd64", "6.12.117+deb12-amd64")
    )
    assert older - newer
    assert newer - older
    for release in ("6.1.0-56-amd64", "to be booted"):
        assert _collected({"DATAPATH_VM_KERNEL": release, "DATAPATH_TEST_FULL": "1"}) == older | newer


def _program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_machines_side_by_side_are_told_apart_and_one_that_fails_is_enough(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_together({"6.1": _program("print('well')"), "6.12": _program("print('so so')")}) == 0
    assert run_together({"6.1": _program("print('well')"), "6.12": _program("raise SystemExit(1)")}) == 1
    assert sorted(capfd.readouterr().out.splitlines()) == ["6.1   well", "6.1   well", "6.12  so so"]


def test_who_is_ended_ends_the_machines_side_by_side(tmp_path: Path) -> None:
    """By the signal that a CI's time limit sends."""
    pids = [tmp_path / "first", tmp_path / "second"]
    waiting = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(300)"
    commands = {path.name: [*_program(waiting), str(path)] for path in pids}
    main = (
        "import signal, sys; from tools.vm.together import run_together\n"
        "signal.signal(signal.SIGTERM, lambda number, _: sys.exit(143))\n"
        f"run_together({commands!r})"
    )
    with subprocess.Popen(_program(main), cwd=boot.REPOSITORY) as process:
        wait_until(lambda: all(path.exists() and path.read_text() for path in pids), "both run")
        process.terminate()
        assert process.wait(60) == 143
    for path in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)
