# SPDX-License-Identifier: Apache-2.0
"""FRR inside a namespace: zebra and bgpd as processes of ours, with sockets and files in a folder of their own."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tools.lab.netns import LabError, Namespace
from tools.lab.patience import PATIENCE
from tools.lab.topology import FAMILIES, Pair

_PROGRAMS: Final = Path("/usr/lib/frr")
_STOP_S: Final = 10.0
_LOG_SHOWN: Final = 4000
_PATIENCE_S: Final = 30.0 * PATIENCE

_CONFIG: Final = """\
{before}router bgp {own}{vrf}
 bgp router-id {address.v4}
 no bgp ebgp-requires-policy
 no bgp network import-check
 neighbor {peer.v4} remote-as {other}
 neighbor {peer.v6} remote-as {other}
 neighbor {peer.v4} timers 1 3
 neighbor {peer.v6} timers 1 3
 neighbor {peer.v4} timers connect 1
 neighbor {peer.v6} timers connect 1
 address-family ipv4 unicast
{lines4}
 exit-address-family
 address-family ipv6 unicast
  neighbor {peer.v6} activate
{lines6}
 exit-address-family
"""


@dataclass(frozen=True, slots=True)
class Speaker:
    """One side of two sessions over one link, one for each family.

    Attributes:
        own: number of the autonomous system.
        other: that of the peer.
        announced: addresses, whether or not there is a route to them, as MetalLB does it.
        announces_default: the peer gets a default route.
        table: what is learned goes there; 0 for where it would go by itself.
        vrf: whose link it is, if any.
    """

    own: int
    other: int
    address: Pair
    peer: Pair
    announced: tuple[Pair, ...] = ()
    announces_default: bool = False
    table: int = 0
    vrf: str = ""

    def config(self) -> str:
        """As it would stand in frr.conf."""
        lines = {family: "\n".join(self._lines(family)) for family in FAMILIES}
        # The map comes first: one that is not known yet denies everything for the five seconds of its delay timer.
        table = f"route-map TO-TABLE permit 10\n set table {self.table}\nexit\n" if self.table else ""
        return _CONFIG.format(
            before=table,
            own=self.own,
            other=self.other,
            vrf=f" vrf {self.vrf}" if self.vrf else "",
            address=self.address,
            peer=self.peer,
            lines4=lines[4],
            lines6=lines[6],
        )

    def _lines(self, family: int) -> Iterator[str]:
        for address in self.announced:
            yield f"  network {address.get(family)}/{address.get(family).max_prefixlen}"
        if self.announces_default:
            yield f"  neighbor {self.peer.get(family)} default-originate"
        if self.table:
            yield f"  neighbor {self.peer.get(family)} route-map TO-TABLE in"


class Frr:
    """A context manager: zebra and bgpd run in a namespace until it ends.

    Args:
        namespace: where.
        speaker: what bgpd is told.
    """

    def __init__(self, namespace: Namespace, speaker: Speaker) -> None:
        self._namespace = namespace
        self._folder = Path()
        self._config = speaker.config()
        self._vrf = f"vrf {speaker.vrf} " if speaker.vrf else ""
        self._stack = ExitStack()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        with ExitStack() as cleanup:
            cleanup.callback(self.close)
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
        found: dict[str, Any] = self.ask(f"show bgp {self._vrf}neighbors {peer}").get(peer, {})
        return str(found.get("bgpState", ""))
