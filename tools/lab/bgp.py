# SPDX-License-Identifier: Apache-2.0
"""FRR inside a namespace: zebra and bgpd as processes of ours, with sockets and files in a folder of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
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


def installed() -> bool:
    """Whether this machine has FRR at all."""
    return (_PROGRAMS / "bgpd").exists()


class Frr:
    """A context manager: zebra and bgpd run in a namespace until it ends.

    Args:
        namespace: where.
        config: of bgpd, as it would stand in frr.conf.
    """

    def __init__(self, namespace: Namespace, config: str) -> None:
        self._namespace = namespace
        self._folder = Path()
        self._config = config
        self._stack = ExitStack()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        with self._stack:
            # The daemons become the user `frr` at once, who may not enter the folders of a test.
            self._folder = Path(
                self._stack.enter_context(tempfile.TemporaryDirectory(prefix="datapath-frr-"))
            )
            (self._folder / "bgpd.conf").write_text(self._config)
            (self._folder / "zebra.conf").write_text("log stdout\n")
            for path in (self._folder, *self._folder.iterdir()):
                shutil.chown(path, "frr", "frr")
            for name in ("zebra", "bgpd"):
                self.start(name)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in reversed(list(self._daemons)):
            self.stop(name)
        self._stack.close()

    def start(self, name: str, *options: str) -> None:
        """Start `zebra` or `bgpd`, with further options, and wait until it listens to vtysh.

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
        # bgpd tries its zebra again after ten seconds only: it must be there first.
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

    def _options(self, name: str) -> list[str]:
        folder = self._folder
        files = ["-f", str(folder / f"{name}.conf"), "-i", str(folder / f"{name}.pid")]
        sockets = ["-z", str(folder / "zserv.api"), "--vty_socket", str(folder)]
        return [*files, *sockets, "-P", "0"]  # no telnet

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

    def wait_established(self, peer: str) -> None:
        """Wait until the session with a peer is up.

        Raises:
            LabError: it does not come up.
        """
        self.wait(lambda: self.state(peer) == "Established", f"the session with {peer} is up")

    def state(self, peer: str) -> str:
        """State of the session with a peer, as BGP calls it; empty for one that is not configured."""
        found: dict[str, Any] = self.ask(f"show bgp neighbors {peer}").get(peer, {})
        return str(found.get("bgpState", ""))
