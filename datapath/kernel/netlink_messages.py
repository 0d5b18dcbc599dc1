# SPDX-License-Identifier: Apache-2.0
"""Netlink messages and their attributes, and what the kernel answers to a request for a dump."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
from collections.abc import Callable, Iterator
from typing import Final

from datapath.errors import KernelError

#: struct nlmsghdr and struct nlattr of linux/netlink.h, in the byte order of this machine.
HEADER: Final = struct.Struct("=IHHII")
ATTRIBUTE: Final = struct.Struct("=HH")
#: Without NLA_F_NESTED and NLA_F_NET_BYTEORDER.
TYPE_MASK: Final = 0x3FFF

_F_DUMP_INTERRUPTED, _F_ACK_TLVS = 0x10, 0x200
ERROR, DONE = 2, 3
#: NLMSG_MIN_TYPE: what is below is about the conversation itself.
MIN_TYPE: Final = 16
_NLMSGERR_MSG: Final = 1
#: NLMSG_DONE of a dump that went well: a header and a zero.
_DONE_BYTES: Final = 20
#: Somebody changes routes all the time on a router: a dump that was interrupted is good enough then, because
#: whatever concerns us comes as an event as well.
_TRIES: Final = 3


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded; nested ones are the payload of their parent."""
    return ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) & 3)


def messages(data: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """Type, sequence number, port id and body of every message of a datagram that nobody asked for.

    Answers to questions are read in place instead: a generator costs a dump of thousands 5 % more.
    """
    view, offset = memoryview(data), 0
    while offset + HEADER.size <= len(data):
        length, kind, _, sequence, port = HEADER.unpack_from(data, offset)
        if length < HEADER.size:
            return
        yield kind, sequence, port, view[offset + HEADER.size : offset + length]
        offset += (length + 3) & ~3


def attributes(body: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each attribute behind a fixed part of `offset` bytes."""
    end = len(body)
    while offset + 4 <= end:
        length, kind = ATTRIBUTE.unpack_from(body, offset)
        if length < 4:
            return
        yield kind & TYPE_MASK, body[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def text(payload: bytes) -> str:
    """A string as attributes carry it: it ends with a zero byte, and nothing says in which encoding it is."""
    return payload.rstrip(b"\0").decode(errors="replace")


def verdict(answer: int, flags: int, body: bytes) -> tuple[int, str]:
    """Errno and words of an NLMSG_ERROR or NLMSG_DONE; 0 is an acknowledgement."""
    code = -int(struct.unpack_from("=i", body)[0]) if len(body) >= 4 else 0
    if code <= 0:
        return 0, ""
    reason = os.strerror(code)
    if flags & _F_ACK_TLVS:
        # An error repeats the header of the request before the attributes (not its body: NETLINK_CAP_ACK).
        found = dict(attributes(body, 20 if answer == ERROR else 4))
        words = text(found.get(_NLMSGERR_MSG, b""))
        reason = f"{reason}: {words}" if words else reason
    return code, reason


class Dump:
    """All answers to a dump request.

    Args:
        what: is listed, for the error.
        collect: asks, and says the sequence number of the request and what came.
    """

    def __init__(self, what: str, collect: Callable[[], tuple[int, list[bytes]]]) -> None:
        self._what = what
        self._collect = collect
        self._sequence, self._datagrams = collect()
        self._is_whole = True

    @property
    def digest(self) -> bytes:
        """The same digest, the same bodies; empty where no more can be said than that this is good enough.

        It knows the sequence number and the port id, too: a socket of its own for each question keeps them as they are.
        """
        if not self._is_whole:
            return b""
        found = hashlib.blake2b(digest_size=16)
        for datagram in self._datagrams:
            found.update(datagram)
        return found.digest()

    def bodies(self) -> list[bytes]:
        """Taken apart; asked for again if something changed meanwhile.

        Raises:
            KernelError: the kernel refused.
        """
        try:
            bodies, self._is_whole = self._take_apart()
            for _ in range(_TRIES - 1):
                if self._is_whole:
                    break
                self._sequence, self._datagrams = self._collect()
                bodies, self._is_whole = self._take_apart()
        except OSError as error:
            reason = error.strerror or str(error)
            raise KernelError(f"list {self._what}", reason, errno=error.errno or 0) from error
        return bodies

    def _take_apart(self) -> tuple[list[bytes], bool]:
        bodies: list[bytes] = []
        seen, expected = 0, self._sequence
        for datagram in self._datagrams:
            offset, end = 0, len(datagram)
            while offset + 16 <= end:
                length, answer, flags, sequence, _ = HEADER.unpack_from(datagram, offset)
                body = datagram[offset + 16 : offset + length]
                offset += (length + 3) & ~3
                if sequence != expected:
                    continue
                seen |= flags
                if answer >= MIN_TYPE:
                    bodies.append(body)
                elif answer in (DONE, ERROR):
                    code, reason = verdict(answer, flags, body)
                    if code:
                        raise OSError(code, reason)
                    return bodies, not seen & _F_DUMP_INTERRUPTED
        raise OSError(errno.ENOBUFS, "the kernel's answer was lost")


def ends_dump(datagram: bytes, sequence: int) -> bool:
    """Whether nothing follows: NLMSG_DONE is the last message, or the first one is that or an error."""
    end = len(datagram) - _DONE_BYTES
    if end < 0:
        return False
    _, first, _, answered, _ = HEADER.unpack_from(datagram)
    if answered == sequence and first in (DONE, ERROR):
        return True
    # Most datagrams have hundreds of messages and another kind of end: only where it looks like one they are counted.
    length, last, _, answered, _ = HEADER.unpack_from(datagram, end)
    if (length, last, answered) != (_DONE_BYTES, DONE, sequence):
        return False
    offset = 0
    while offset < end:
        offset += (max(HEADER.unpack_from(datagram, offset)[0], HEADER.size) + 3) & ~3
    return offset == end
