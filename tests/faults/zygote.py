# SPDX-License-Identifier: Apache-2.0
"""One process inside a namespace that forks a child for each operation: quick, and each child may be killed.

Run as a program: reads one JSON request a line, answers one JSON line. It has no threads, so forking is safe.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from tools.lab.netns import Namespace

if TYPE_CHECKING:
    from datapath.state import StateDirectory


class Zygote:
    """The other end: a context manager that runs the program in a namespace."""

    def __init__(self, namespace: Namespace) -> None:
        argv = namespace.argv(sys.executable, "-m", "tests.faults.zygote")
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def ask(self, verb: str, state: Path, **request: Any) -> dict[str, Any]:
        """One operation.

        Args:
            verb: `apply`, `teardown`, `rollback`, `drift`, or `move` (from filters to tcx, as the daemon does it).
            state: the state directory.
            request: `policy` (a path), `devices` (how many are to move), `kill_at` (die at this point), `fail_at` and
                `errno` (this point fails).

        Returns:
            `killed`, or `error` and `points` (the names of all points in order), `changed`, `fds`.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps({"verb": verb, "state": str(state), **request}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the zygote died"
        answer: dict[str, Any] = json.loads(line)
        return answer


def _open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _operate(request: dict[str, Any]) -> dict[str, Any]:
    # Imported before the first fork by _main; named here so that the module loads without root.
    from datapath import points  # noqa: PLC0415
    from datapath.controller import Controller  # noqa: PLC0415
    from datapath.errors import DatapathError, KernelError  # noqa: PLC0415
    from datapath.policy import load_policy  # noqa: PLC0415
    from datapath.state import StateDirectory  # noqa: PLC0415

    passed: list[str] = []

    def listener(name: str) -> None:
        number = len(passed)
        passed.append(name)
        if number == request.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if number == request.get("fail_at"):
            code = request["errno"]
            raise KernelError(name, f"{os.strerror(code)} ({errno.errorcode[code]})", errno=code)

    controller = Controller(StateDirectory(Path(request["state"])))
    fds = _open_descriptors()
    answer: dict[str, Any] = {"error": "", "changed": False}
    with points.listening(listener):
        try:
            if request["verb"] == "apply":
                answer["changed"] = bool(controller.apply(load_policy(Path(request["policy"]))).steps)
            elif request["verb"] == "teardown":
                answer["changed"] = bool(controller.teardown())
            elif request["verb"] == "rollback":
                answer["changed"] = bool(controller.rollback().steps)
            elif request["verb"] == "move":
                _move(StateDirectory(Path(request["state"])), request["devices"])
            else:
                drift = controller.status()
                answer["drift"] = [step.describe() for step in drift.steps] if drift else None
        except DatapathError as error:
            answer["error"] = str(error)
    return answer | {"points": passed, "fds": _open_descriptors() - fds}


def _move(directory: StateDirectory, devices: int) -> None:
    from datapath.kernel import bpf  # noqa: PLC0415
    from datapath.observe.stats import ServiceStats  # noqa: PLC0415
    from datapath.service.mover import Mover  # noqa: PLC0415
    from datapath.service.timers import Timers  # noqa: PLC0415

    mover = Mover(directory, Timers(), ServiceStats(), lambda _: None)
    mover.follow(bpf.observe_ingress().filtered)
    for _ in range(min(devices, mover.left)):
        mover.move()


def _main() -> None:
    import datapath.controller  # noqa: F401, PLC0415  (children inherit it)
    from datapath import log  # noqa: PLC0415

    log.configure()
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as answer:
                json.dump(_operate(json.loads(line)), answer)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            text = answer.read()
        os.waitpid(child, 0)
        sys.stdout.write((text or json.dumps({"killed": True})) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
