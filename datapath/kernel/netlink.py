# SPDX-License-Identifier: Apache-2.0
"""Raw netlink: one socket, dumps, and changes that travel many to a message.

A netlink library spends a quarter of a millisecond on a message; with 4,094 networks that is seconds for rules and
routes alone. Here a dump is a list of plain bodies, and a batch of changes is one system call. What the bodies mean
is for the modules that use this one.

rtnetlink does all of its work inside `sendmsg` (and the rest of a dump inside `recvmsg`): an answer is either in the
queue already or it never comes, so nothing here waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, Self

from datapath.errors import KernelError
from datapath.kernel.netlink_messages import ERROR, HEADER, MIN_TYPE, Dump, ends_dump, verdict

F_REPLACE, F_EXCL, F_CREATE = 0x100, 0x200, 0x400
#: Options of sockets, and a protocol, that Python's `socket` has not got.
NETLINK_NETFILTER: Final = 12
SOL_NETLINK: Final = 270
SO_RCVBUFFORCE: Final = 33
#: Changes in one `sendmsg`: more save nothing that could be measured, and 256 answers fit any receive buffer.
BATCH_MAX: Final = 256

#: Questions in one `sendmsg`: an answer takes up to 8 KB of the queue.
_QUESTIONS_MAX: Final = 64
#: So many answers fit the queue that every socket has.
_QUESTIONS_FEW: Final = 16

_F_REQUEST, _F_ACK, _F_DUMP = 0x001, 0x004, 0x300
_EXT_ACK, _CAP_ACK, _STRICT_CHECK = 11, 10, 12
#: A refusal takes about 1 KB of the queue.
_QUEUE_BYTES: Final = 1 << 20
#: The kernel fills at most 32 KB unless a single message is larger (a device with a hundred virtual functions).
_RECEIVE_BYTES: Final = 1 << 18
#: The largest process id takes 22 bits of the 32 of a port id.
_PID_WIDTH: Final = 22
_FIRST_PORT: Final = 512


@dataclass(slots=True)
class Traffic:
    """What this process has done through this module, for tests that count instead of timing.

    Attributes:
        sent_messages: requests; a batch of n changes counts n.
        changes: those of them that are to change something.
        syscalls: all of them, the making of sockets included.
    """

    sent_messages: int = 0
    changes: int = 0
    syscalls: int = 0


TRAFFIC: Final = Traffic()


class Request(NamedTuple):
    """Message type, flags besides NLM_F_REQUEST, and what follows the header, padded to four bytes."""

    kind: int
    flags: int
    body: bytes


class Refusal(NamedTuple):
    """The kernel's no to one request of a batch.

    Attributes:
        number: of the request, from 0.
        reason: strerror, and the kernel's own words where it has some.
    """

    number: int
    errno: int
    reason: str

    def error(self, operation: str) -> KernelError:
        """To be raised by whoever wanted it done."""
        return KernelError(operation, self.reason, errno=self.errno)


def bind_aside(sock: socket.socket) -> None:
    """Bind to a port id that tells our pid, but leave the pid itself to libraries that insist on it.

    The kernel gives a process's first socket the pid and every further one a random number: then nobody, and not
    even we, could tell who made a change.
    """
    for number in range(_FIRST_PORT, _FIRST_PORT + 256):
        try:
            sock.bind((os.getpid() | number << _PID_WIDTH, 0))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return


class Netlink:
    """One netlink socket of the current network namespace. Use as a context manager, or close it.

    Args:
        protocol: NETLINK_ROUTE and the like.
    """

    def __init__(self, protocol: int = socket.NETLINK_ROUTE) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            # The kernel filters dumps and refuses what it does not know: a router's full table is not read for
            # our few routes. Refusals come with words and without the request.
            for option in (_STRICT_CHECK, _EXT_ACK, _CAP_ACK):
                self._socket.setsockopt(SOL_NETLINK, option, 1)
            bind_aside(self._socket)
        except BaseException:
            self._socket.close()
            raise
        self._sequence = 0
        self._buffer = bytearray()
        self._is_queue_grown = False
        TRAFFIC.syscalls += 5

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Port id: what an event about a change of this socket's is signed with."""
        return int(self._socket.getsockname()[0])

    def close(self) -> None:
        self._socket.close()
        TRAFFIC.syscalls += 1

    def dump(self, what: str, kind: int, request: bytes) -> list[bytes]:
        """Bodies of all answers to a dump request.

        Args:
            what: is listed, for the error.
            kind: message type of the request.
            request: what follows the header.

        Raises:
            KernelError: the kernel refused.
        """
        return self.raw_dump(what, kind, request).bodies()

    def raw_dump(self, what: str, kind: int, request: bytes) -> Dump:
        """The same, not taken apart yet.

        Raises:
            KernelError: the kernel could not be asked.
        """
        return Dump(what, lambda: self._collect(what, kind, request))

    def _collect(self, what: str, kind: int, request: bytes) -> tuple[int, list[bytes]]:
        datagrams: list[bytes] = []
        try:
            self._send([Request(kind, _F_DUMP, request)])
            while not (datagrams and ends_dump(datagrams[-1], self._sequence)):
                datagrams.append(self._receive())
        except OSError as error:
            # What failed halfway may end with words: that, or that it is cut off, is found later.
            if datagrams:
                return self._sequence, datagrams
            raise KernelError(f"list {what}", error.strerror or str(error), errno=error.errno or 0) from error
        return self._sequence, datagrams

    def ask(self, what: str, requests: Sequence[Request]) -> list[bytes | int]:
        """Questions that have one answer each, `_QUESTIONS_MAX` in a system call.

        Args:
            what: is asked for, for the error.
            requests: no dumps and no changes.

        Returns:
            for each the body of its answer, or the errno that it was refused with.

        Raises:
            KernelError: the kernel could not be asked, or its answer was lost.
        """
        answers: list[bytes | int] = []
        if len(requests) > _QUESTIONS_FEW:
            self._grow_queue()
        for start in range(0, len(requests), _QUESTIONS_MAX):
            try:
                answers += self._ask_batch(requests[start : start + _QUESTIONS_MAX])
            except OSError as error:
                raise KernelError(
                    f"list {what}", error.strerror or str(error), errno=error.errno or 0
                ) from error
        return answers

    def _ask_batch(self, batch: Sequence[Request]) -> list[bytes | int]:
        first = self._sequence + 1
        self._send(batch)
        answers: dict[int, bytes | int] = {}
        while len(answers) < len(batch):
            datagram = self._receive()
            offset = 0
            while offset + 16 <= len(datagram):
                length, kind, flags, sequence, _ = HEADER.unpack_from(datagram, offset)
                body = datagram[offset + 16 : offset + length]
                offset += (length + 3) & ~3
                if sequence >= first:
                    answers[sequence] = body if kind >= MIN_TYPE else verdict(kind, flags, body)[0]
        return [answers[first + number] for number in range(len(batch))]

    def change(self, requests: Sequence[Request]) -> list[Refusal]:
        """Carry out changes in order, `BATCH_MAX` in a system call; a refused one does not stop the others.

        Only the last of a batch is acknowledged: refusals always are.

        Returns:
            what was refused, in order; empty where all is well.

        Raises:
            KernelError: the kernel could not be asked, or its answer was lost.
        """
        refusals: list[Refusal] = []
        TRAFFIC.changes += len(requests)
        for start in range(0, len(requests), BATCH_MAX):
            batch = requests[start : start + BATCH_MAX]
            try:
                found = self._change_batch(batch)
            except OSError as error:
                reason = error.strerror or str(error)
                raise KernelError("talk to the kernel", reason, errno=error.errno or 0) from error
            refusals += [refusal._replace(number=refusal.number + start) for refusal in found]
        return refusals

    def _change_batch(self, batch: Sequence[Request]) -> list[Refusal]:
        self._grow_queue()
        first = self._sequence + 1
        self._send(batch, _F_ACK)
        refusals: list[Refusal] = []
        while True:
            try:
                datagram = self._receive()
            except OSError:
                if refusals:  # the queue overflowed, but what is in it came first
                    return refusals
                raise
            offset = 0
            while offset + 16 <= len(datagram):
                length, answer, flags, sequence, _ = HEADER.unpack_from(datagram, offset)
                body = datagram[offset + 16 : offset + length]
                offset += (length + 3) & ~3
                if answer != ERROR or sequence < first:
                    continue
                code, reason = verdict(answer, flags, body)
                if code:
                    refusals.append(Refusal(sequence - first, code, reason))
                if sequence == self._sequence:
                    return refusals

    def _grow_queue(self) -> None:
        """Room for the refusals of a whole batch; without the privilege for it, most of them."""
        if not self._is_queue_grown:
            with contextlib.suppress(PermissionError):
                self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _QUEUE_BYTES)
            self._is_queue_grown = True
            TRAFFIC.syscalls += 1

    def _send(self, requests: Sequence[Request], flags_of_last: int = 0) -> None:
        parts: list[bytes] = []
        last = len(requests) - 1
        for index, (kind, flags, body) in enumerate(requests):
            self._sequence += 1
            extra = _F_REQUEST | (flags_of_last if index == last else 0)
            parts += (HEADER.pack(16 + len(body), kind, flags | extra, self._sequence, 0), body)
        TRAFFIC.sent_messages += len(requests)
        TRAFFIC.syscalls += 1
        self._socket.send(b"".join(parts))

    def _receive(self) -> bytes:
        """One datagram that is there already.

        Raises:
            OSError: ENOBUFS where nothing is there: the kernel had no memory for the answer, or the queue no room.
        """
        if not self._buffer:
            self._buffer = bytearray(_RECEIVE_BYTES)
        while True:
            TRAFFIC.syscalls += 1
            try:
                length = self._socket.recv_into(self._buffer, 0, socket.MSG_DONTWAIT | socket.MSG_TRUNC)
            except BlockingIOError:
                raise OSError(errno.ENOBUFS, "the kernel's answer was lost") from None
            except OSError as error:
                # Said once, before what is in the queue.
                if error.errno != errno.ENOBUFS:
                    raise
            else:
                if length > _RECEIVE_BYTES:
                    raise OSError(errno.EMSGSIZE, f"an answer of {length} bytes")
                return bytes(memoryview(self._buffer)[:length])
