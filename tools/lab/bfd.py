# SPDX-License-Identifier: Apache-2.0
"""BFD by FRR inside a namespace."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tools.lab.frr import FrrDaemons
from tools.lab.netns import Namespace

#: A busy machine keeps a daemon of FRR waiting for a second, too: 3 s is what a session outlives.
_SESSION: Final = """\
 peer {peer} interface {device}
  detect-multiplier 10
  receive-interval 300
  transmit-interval 300
 exit
"""


class Bfd(FrrDaemons):
    """A context manager: zebra and bfdd run in a namespace until it ends.

    Args:
        namespace: where.
        device: of all its sessions.
        peers: addresses.
    """

    def __init__(self, namespace: Namespace, device: str, peers: Iterable[str]) -> None:
        sessions = "".join(_SESSION.format(peer=peer, device=device) for peer in peers)
        super().__init__(namespace, {"bfdd": f"bfd\n{sessions}exit\n"})

    @property
    def socket(self) -> Path:
        """Where vtysh asks bfdd."""
        return self._folder / "bfdd.vty"

    def wait_up(self, *peers: str) -> None:
        """Wait until the sessions with these are up.

        Raises:
            LabError: one does not come up.
        """
        self.wait(lambda: self.up() >= set(peers), f"BFD sessions with {peers} are up")

    def up(self) -> set[str]:
        """Peers whose sessions are up."""
        return {
            str(session["peer"]) for session in self.ask_list("show bfd peers") if session["status"] == "up"
        }
