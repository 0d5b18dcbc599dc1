# SPDX-License-Identifier: Apache-2.0
"""FRR inside a namespace: daemons as processes of ours, with sockets and files in a folder of their own."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tools.lab.netns import LabError, Namespace
from tools.lab.patience import PATIENCE

_PROGRAMS: Final = Path("/usr/lib/frr")
_STOP_S: Final = 10.0
_LOG_SHOWN: Final = 4000
_PATIENCE_S: Final = 30.0 * PATIENCE


class FrrDaemons:
    """A context manager: zebra and others run in a namespace until it ends.

    Args:
        namespace: where.
        configs: of the others, by name.
    """

    def __init__(self, namespace: Namespace, configs: Mapping[str, str]) -> None:
        self._namespace = namespace
        self._folder = Path()
        self._configs = {"zebra": "log stdout\n", **configs}
        self._stack = ExitStack()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            cleanup.callback(self.close)
            # The daemons become the user `frr` at once, who may not enter the folders of a test.
            self._folder = Path(
                self._stack.enter_context(tempfile.TemporaryDirectory(prefix="datapath-frr-"))
            )
            for name, config in self._configs.items():
                (self._folder / f"{name}.conf").write_text(config)
            for path in (self._folder, *self._folder.iterdir()):
                shutil.chown(path, "frr", "frr")
            for name in self._configs:
                self.start(name)
            cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop what runs of it, and remove its folder."""
        for name in reversed(list(self._daemons)):
            self.stop(name)
        self._stack.close()

    def start(self, name: str, *options: str) -> None:
        """Start one of them, with further options, and wait until it listens to vtysh.

        Raises:
            LabError: it did not come up.
        """
        log = self._stack.enter_context((self._folder / f"{name}.log").open("ab"))
        self._daemons[name] = subprocess.Popen(
            self._namespace.argv(str(_PROGRAMS / name), *self._options(name), *options),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=self._folder,
        )
        sockets = [self._folder / f"{name}.vty", self._folder / "zserv.api"]
        # The others try their zebra again after ten seconds only: it must be there first.
        self.wait(lambda: all(map(Path.is_socket, sockets)) and self._answers(name), f"{name} answers")

    def stop(self, name: str, *, kill: bool = False) -> None:
        """End one of them; `kill` leaves it no time to say goodbye."""
        daemon = self._daemons.pop(name)
        (daemon.kill if kill else daemon.terminate)()
        try:
            daemon.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        for path in (f"{name}.vty", "zserv.api") if name == "zebra" else (f"{name}.vty",):
            (self._folder / path).unlink(missing_ok=True)

    def pause(self, name: str) -> None:
        """As if it hung."""
        self._daemons[name].send_signal(signal.SIGSTOP)

    def resume(self, name: str) -> None:
        self._daemons[name].send_signal(signal.SIGCONT)

    def _options(self, name: str) -> list[str]:
        folder = self._folder
        files = ["-f", str(folder / f"{name}.conf"), "-i", str(folder / f"{name}.pid")]
        sockets = ["-z", str(folder / "zserv.api"), "--vty_socket", str(folder)]
        # bfdd has one more, for programs that want to be told of sessions.
        control = ["--bfdctl", str(folder / "bfdd.ctl")] if name == "bfdd" else []
        return [*files, *sockets, *control, "-P", "0"]  # no telnet

    def _answers(self, name: str) -> bool:
        return self._vtysh(["-d", name, "-c", "show version"]).returncode == 0

    def _vtysh(self, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["vtysh", "--vty_socket", str(self._folder), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE_S,
        )

    def tell(self, *commands: str) -> str:
        """Give commands to the shell of FRR, one after the other, and return what it said.

        Raises:
            LabError: it refused one.
        """
        done = self._vtysh([word for command in commands for word in ("-c", command)])
        if done.returncode != 0 or "% " in done.stdout:
            raise LabError(f"vtysh {commands}: {done.stderr}{done.stdout}")
        return done.stdout

    def ask(self, command: str) -> dict[str, Any]:
        """Return the answer to `show ... json`."""
        answer: dict[str, Any] = json.loads(self.tell(f"{command} json") or "{}")
        return answer

    def ask_list(self, command: str) -> list[dict[str, Any]]:
        """Return the answer to `show ... json` where it is a list."""
        answer: list[dict[str, Any]] = json.loads(self.tell(f"{command} json") or "[]")
        return answer

    def wait(self, true: Callable[[], bool], what: str) -> None:
        """Wait until something is so.

        Raises:
            LabError: it does not become so.
        """
        end = time.monotonic() + _PATIENCE_S
        while not true():
            for name, daemon in self._daemons.items():
                if daemon.poll() is not None:
                    raise LabError(f"{name} in {self._namespace.name} is gone: {self._log(name)}")
            if time.monotonic() > end:
                logs = "\n".join(self._log(name) for name in self._daemons)
                raise LabError(f"FRR in {self._namespace.name}: waited in vain until {what}\n{logs}")
            time.sleep(0.05)

    def _log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")[-_LOG_SHOWN:]
