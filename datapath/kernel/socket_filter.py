# SPDX-License-Identifier: Apache-2.0
"""A classic BPF filter on an rtnetlink socket: foreign routes are dropped in the kernel, before any wake-up."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterable
from typing import Final

_SO_ATTACH_FILTER: Final = 26
_INSTRUCTION: Final = struct.Struct("=HBBI")
# linux/bpf_common.h and linux/filter.h.
_LD_BYTE_ABS, _LD_HALF_ABS, _LD_WORD_ABS, _LD_HALF_IND = 0x30, 0x28, 0x20, 0x48
_LD_IMM, _LDX_IMM, _TAX, _JEQ, _RET = 0x00, 0x01, 0x07, 0x15, 0x06
#: SKF_AD_OFF + SKF_AD_NLATTR: A becomes the offset of the attribute of type X at or behind A, or 0.
_FIND_ATTRIBUTE: Final = 0xFFFFF000 + 12
_ACCEPT: Final = 0xFFFFFFFF

_NEWROUTE, _DELROUTE = 24, 25
_RTM_DST_LEN, _RTM_TABLE, _RTM_PROTOCOL, _ATTRIBUTES = 16 + 1, 16 + 4, 16 + 5, 16 + 12
_RTA_TABLE: Final = 15
#: Offsets behind the link header, and values, of ARP, IPv6 and ICMPv6.
_ARP_OPERATION, _ARP_REPLY = 6, 2
_IPV6_NEXT_HEADER, _ICMPV6_TYPE, _NEIGHBOUR_ADVERTISEMENT = 6, 40, 136
#: rtm_table of a table whose number does not fit into a byte (RT_TABLE_COMPAT).
_COMPAT: Final = 252
#: A filter may have 4,096 instructions; this many tables of scattered numbers are filtered by us instead.
_CHOICES_MAX: Final = 200


def attach_route_filter(
    sock: socket.socket, protocol: int, tables: Iterable[int], *, default_routes: bool = False
) -> None:
    """Let only those routes through that carry our protocol, or whose table may be one of ours.

    Messages about anything but routes pass. Tables above 255 are told by the upper half of their number: a
    coarse sieve that costs one comparison, because a filter has no loop and reads big-endian only.

    Args:
        sock: an rtnetlink socket; a filter that it has is replaced.
        protocol: rtm_protocol of our routes.
        tables: routing tables of ours.
        default_routes: let these through, too, whatever their table.
    """
    _attach(sock, route_filter(protocol, tables, default_routes=default_routes))


def _attach(sock: socket.socket, code: bytes) -> None:
    buffer = ctypes.create_string_buffer(code, len(code))
    # struct sock_fprog: length, padding, pointer.
    program = struct.pack("@HP", len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def attach_answer_filter(sock: socket.socket, family: int) -> None:
    """Let only ARP replies (family 4) or neighbour advertisements (6) into a packet socket without link headers."""
    if family == 4:
        tests = [(_LD_HALF_ABS, 0, 0, _ARP_OPERATION), (_JEQ, 0, 1, _ARP_REPLY)]
    else:
        tests = [
            (_LD_BYTE_ABS, 0, 0, _IPV6_NEXT_HEADER),
            (_JEQ, 0, 3, socket.IPPROTO_ICMPV6),
            (_LD_BYTE_ABS, 0, 0, _ICMPV6_TYPE),
            (_JEQ, 0, 1, _NEIGHBOUR_ADVERTISEMENT),
        ]
    _attach(sock, _assemble([*tests, (_RET, 0, 0, _ACCEPT), (_RET, 0, 0, 0)]))


def route_filter(protocol: int, tables: Iterable[int], *, default_routes: bool = False) -> bytes:
    """The filter's code; see `attach_route_filter`."""
    small = sorted({table for table in tables if table < 256})
    upper = sorted({_upper_half(table) for table in tables if table >= 256})
    if len(upper) > _CHOICES_MAX:
        return _assemble([(_RET, 0, 0, _ACCEPT)])
    lines: list[tuple[int, int, int, int]] = [
        (_LD_HALF_ABS, 0, 0, 4),
        (_JEQ, 2, 0, socket.htons(_NEWROUTE)),
        (_JEQ, 1, 0, socket.htons(_DELROUTE)),
        (_RET, 0, 0, _ACCEPT),
        (_LD_BYTE_ABS, 0, 0, _RTM_PROTOCOL),
        (_JEQ, 0, 1, protocol),
        (_RET, 0, 0, _ACCEPT),
    ]
    if default_routes:
        lines += [(_LD_BYTE_ABS, 0, 0, _RTM_DST_LEN), (_JEQ, 0, 1, 0), (_RET, 0, 0, _ACCEPT)]
    lines.append((_LD_BYTE_ABS, 0, 0, _RTM_TABLE))
    for table in small:
        lines += [(_JEQ, 0, 1, table), (_RET, 0, 0, _ACCEPT)]
    lines += [
        (_JEQ, 1, 0, _COMPAT),
        (_RET, 0, 0, 0),
        (_LDX_IMM, 0, 0, _RTA_TABLE),
        (_LD_IMM, 0, 0, _ATTRIBUTES),
        (_LD_WORD_ABS, 0, 0, _FIND_ATTRIBUTE),
        (_JEQ, 0, 1, 0),
        (_RET, 0, 0, 0),
        (_TAX, 0, 0, 0),
        (_LD_HALF_IND, 0, 0, 4 + _UPPER_OFFSET),
    ]
    for half in upper:
        lines += [(_JEQ, 0, 1, half), (_RET, 0, 0, _ACCEPT)]
    return _assemble([*lines, (_RET, 0, 0, 0)])


#: Where the upper half of a 32-bit number lies on this machine.
_UPPER_OFFSET: Final = struct.pack("=I", 0xFFFF0000).index(0xFF)


def _upper_half(table: int) -> int:
    """As a big-endian load of those two bytes gives it."""
    pair = struct.pack("=I", table)[_UPPER_OFFSET : _UPPER_OFFSET + 2]
    return int.from_bytes(pair, "big")


def _assemble(lines: list[tuple[int, int, int, int]]) -> bytes:
    return b"".join(_INSTRUCTION.pack(*line) for line in lines)
