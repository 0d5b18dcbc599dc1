# SPDX-License-Identifier: Apache-2.0
"""FRR's BFD sessions, over the socket that vtysh talks to: one connection stays open, and a question is one command.

A command ends with a NUL. What the daemon says is text, three NULs and a status byte (vtysh_read() of FRR's lib/vty.c;
tried with 8.4). bfdd answers in the order of the questions, and says nothing by itself on this socket.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final

from datapath.kernel.gateway_questions import Questions

Address = IPv4Address | IPv6Address

#: A new connection sees what everybody may; sessions are shown to who is enabled. Nobody asks for a password here.
_HELLO: Final = b"enable\0"
_QUESTION: Final = b"show bfd peers json\0"
_END: Final = bytes(3)
#: CMD_SUCCESS of FRR's lib/command.h.
_SUCCESS: Final = 0
#: A thousand sessions are 0.7 MB.
_TEXT_MAX: Final = 16 << 20
_READ: Final = 1 << 16
_READS_MAX: Final = _TEXT_MAX // _READ + 1
#: A busy machine keeps bfdd waiting, too: only what takes this long is worth a line in the log.
_PATIENCE_S: Final = 5.0

_UP: Final = "up"
_SHUT: Final = "shutdown"


class VtyStream:
    """Puts together what a daemon of FRR says, from whatever pieces it comes in."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, piece: bytes) -> Iterator[tuple[int, bytes]]:
        """Status and text of each answer that is complete by this piece.

        Raises:
            ValueError: no daemon of FRR says that.
        """
        # An end that is not complete yet is looked at again.
        begin = max(0, len(self._buffer) - 3)
        self._buffer += piece
        while (end := self._buffer.find(b"\0", begin)) >= 0 and len(self._buffer) >= end + 4:
            if self._buffer[end : end + 3] != _END:
                raise ValueError("a NUL within the text")
            status, text = self._buffer[end + 3], bytes(self._buffer[:end])
            del self._buffer[: end + 4]
            begin = 0
            yield status, text
        if len(self._buffer) > _TEXT_MAX:
            raise ValueError("more text than any number of sessions is")


def sessions_of(text: bytes, device: str) -> dict[Address, str]:
    """States of the sessions over one hop on a device, by the peer's address, as FRR calls them.

    Of several with one peer, which have different local addresses, one that is up is enough.

    Raises:
        ValueError: that is not what `show bfd peers json` says.
    """
    try:
        listed = json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is too deep") from error
    found: dict[Address, str] = {}
    for session in _list(listed):
        address = _peer(session, device)
        if address is not None and found.get(address) != _UP:
            found[address] = str(session.get("status"))
    return found


def _list(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    # To callers it is as wrong as text that is no JSON at all.
    raise ValueError("JSON, but no list")


def _peer(session: Any, device: str) -> Address | None:
    if not isinstance(session, dict) or session.get("interface") != device or session.get("multihop"):
        return None
    try:
        return ip_address(str(session.get("peer")).partition("%")[0])
    except ValueError:
        return None


class BfdSessions(Questions):
    """Whose session is up? One that is not answers nothing; what FRR itself does not say is nobody's miss."""

    def __init__(self, device: str, family: int, path: str) -> None:
        """Raises OSError: there is no such device, or no bfdd of FRR that may be asked."""
        self._path, self._name = path, ""
        self._stream = VtyStream()
        self._sessions: dict[Address, str] | None = None
        #: Of the greeting; questions come after it.
        self._unread = 0
        self._asked_at_s: float | None = None
        self._failure: OSError | None = None
        super().__init__(device, family)

    def _open(self, device: str) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.connect(self._path)
            sock.send(_HELLO, socket.MSG_NOSIGNAL)
        except OSError as error:
            sock.close()
            raise OSError(error.errno, _unreachable(self._path, error)) from error
        self._name, self._unread = device, 1
        return sock

    def _ask(self, target: Address, *, everybody: bool) -> None:  # noqa: ARG002
        """One answer tells of all gateways: who asks for the second one waits for the same."""
        if self._failure is not None:
            raise self._failure
        if self._asked_at_s is not None:
            return
        try:
            self._socket.send(_QUESTION, socket.MSG_NOSIGNAL)
        except OSError as error:
            raise OSError(error.errno, _unreachable(self._path, error)) from error
        self._unread += 1
        self._asked_at_s = time.monotonic()

    def answers(self) -> set[Address]:
        """Those whose sessions are up by what FRR said since the last call. Never waits."""
        heard: dict[Address, str] | None = None
        if self._failure is None:
            try:
                heard = self._read()
            except ValueError as error:
                reason = f"what listens at {self._path} does not speak as FRR's bfdd does: {error}"
                self._failure = OSError(errno.EPROTO, reason)
            except OSError as error:
                self._failure = OSError(error.errno, _unreachable(self._path, error))
        if heard is None:
            return set()
        self._sessions = heard
        return {
            address for address, state in heard.items() if state == _UP and address.version == self.family
        }

    def _read(self) -> dict[Address, str] | None:
        heard: dict[Address, str] | None = None
        with contextlib.suppress(BlockingIOError):
            for _ in range(_READS_MAX):
                piece = self._socket.recv(_READ)
                if not piece:
                    raise OSError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                for status, text in self._stream.feed(piece):
                    answer = self._heard(status, text)
                    heard = heard if answer is None else answer
        return heard

    def _heard(self, status: int, text: bytes) -> dict[Address, str] | None:
        if self._unread == 0:
            raise ValueError("an answer that nobody asked for")
        self._unread -= 1
        # That to the greeting says nothing, whatever it is: what counts is whether the question is answered.
        if self._unread > 0 or self._asked_at_s is None:
            return None
        if status != _SUCCESS:
            raise ValueError(f"it refuses `show bfd peers json` with status {status}")
        self._asked_at_s = None
        return sessions_of(text, self._name)

    def is_waiting(self) -> bool:
        """Whether FRR may still answer the last question: until then it says nothing about a gateway."""
        return self._failure is None and self._waited_s() < _PATIENCE_S and self._asked_at_s is not None

    def trouble(self, target: Address) -> str:
        """Why nothing is known of a gateway, though bfdd was asked."""
        if self._failure is not None:
            return self._failure.strerror or str(self._failure)
        if self._waited_s() >= _PATIENCE_S:
            return f"FRR's bfdd has not answered at {self._path} yet: is it hung, or the machine overloaded?"
        if self._sessions is None:
            return ""
        state = self._sessions.get(target)
        if state is None:
            return (
                f"FRR has no BFD session with it on {self._name}: in FRR, `bfd`, "
                f"`peer {target} interface {self._name}`, and on the gateway the same for this node"
            )
        if state == _SHUT:
            return f"its BFD session is shut down in FRR: `no shutdown` at `peer {target}`"
        return ""

    def _waited_s(self) -> float:
        return 0.0 if self._asked_at_s is None else time.monotonic() - self._asked_at_s


def _unreachable(path: str, error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        folder = Path(path).parent
        return (
            f"the service may not use {path}: `systemctl edit datapath`: [Service] SupplementaryGroups=frrvty "
            f"(or the group that `ls -l {folder}` shows)"
        )
    if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE):
        return (
            f"no bfdd of FRR listens at {path}: set `bfdd=yes` in /etc/frr/daemons and restart FRR, or name its socket "
            "in `gateway_check.bfd_socket`"
        )
    return f"FRR's bfdd cannot be asked at {path}: {error.strerror or error}"
