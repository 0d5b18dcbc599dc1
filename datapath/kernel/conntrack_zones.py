# SPDX-License-Identifier: Apache-2.0
"""Connections that move to another zone: an entry's zone cannot be changed, so each is made anew in its place.

What the kernel remembers of TCP windows is not in a listing; moved connections are checked liberally, as
conntrackd does with those that it takes over.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

from datapath.kernel.ctnetlink import (
    CTA_MARK,
    CTA_TUPLE_ORIG,
    CTA_ZONE,
    DELETE,
    NEW,
    dump_entries,
    entry_attributes,
    header,
    marked,
    nest,
    open_ctnetlink,
)
from datapath.kernel.netlink import F_CREATE, F_EXCL, Netlink, Request
from datapath.kernel.netlink_messages import attribute, attributes
from datapath.plan.model import ZoneChange

#: The CTA_* of linux/netfilter/nfnetlink_conntrack.h.
_ORIGINAL, _REPLY, _STATUS, _PROTOINFO, _HELP, _NAT_SRC, _TIMEOUT = CTA_TUPLE_ORIG, 2, 3, 4, 5, 6, 7
_NAT_DST, _SEQ_ADJ_ORIG, _SEQ_ADJ_REPLY, _LABELS = 13, 15, 16, 22
_TUPLE_IP, _TUPLE_PROTO, _TUPLE_ZONE = 1, 2, 3
#: CTA_IP_*: source and destination, by family. CTA_NAT_*: lowest and highest address.
_ADDRESSES: Final[dict[int, tuple[int, int]]] = {socket.AF_INET: (1, 2), socket.AF_INET6: (3, 4)}
_NAT_ADDRESSES: Final[dict[int, tuple[int, int]]] = {socket.AF_INET: (1, 2), socket.AF_INET6: (4, 5)}
_NAT_PROTO, _NAT_PORT_MIN, _NAT_PORT_MAX = 3, 1, 2
_PROTO_SRC_PORT, _PROTO_DST_PORT = 2, 3
#: CTA_PROTO_ICMP_ID and CTA_PROTO_ICMPV6_ID.
_PROTO_IDS: Final = (4, 7)
#: An expected connection cannot be made as one, and the kernel sets the bits of NAT itself.
_STATUS_KEPT: Final = 0x0E
_PROTOINFO_TCP: Final = 1
_TCP_FLAGS: Final = (4, 5)
_TCP_KEPT, _TCP_LIBERAL = 0x07, 0x08
_COPIED: Final = (_HELP, _TIMEOUT, CTA_MARK, _SEQ_ADJ_ORIG, _SEQ_ADJ_REPLY, _LABELS)
_COPIED_NESTS: Final = (_HELP, _SEQ_ADJ_ORIG, _SEQ_ADJ_REPLY)

_Tuple = dict[int, bytes]


def move(change: ZoneChange) -> int:
    """Move every entry of a network whose original direction is in the old zone.

    Where the new zone has an equal connection already, and where the answers would look the same, the entry is lost.

    Returns:
        how many entries were moved.

    Raises:
        KernelError: the kernel refused.
    """
    with open_ctnetlink() as channel:
        return sum(_move_family(channel, change, family) for family in _ADDRESSES)


def _move_family(channel: Netlink, change: ZoneChange, family: int) -> int:
    start = header(family)
    requests: list[Request] = []
    for body in dump_entries(channel, family, marked(change.fwmark, change.mask)):
        entry = entry_attributes(body)
        if zone_of(entry) == change.old:
            # Side by side: between the two, an answer would be taken for a new connection.
            requests.append(Request(DELETE, 0, start + nest(_ORIGINAL, entry[_ORIGINAL])))
            requests.append(Request(NEW, F_CREATE | F_EXCL, start + _moved(entry, change.new, family)))
    refusals = channel.change(requests)
    for refusal in refusals:
        if refusal.errno not in {errno.ENOENT, errno.EEXIST}:
            raise refusal.error("move conntrack entries")
    made = {refusal.number for refusal in refusals if refusal.number % 2}
    return len(requests) // 2 - len(made)


def zone_of(entry: dict[int, bytes]) -> int | None:
    """Zone of the original direction; None where the answers have one as well, which ours never have."""
    if CTA_ZONE in entry:
        return None
    return int.from_bytes(dict(attributes(entry[_ORIGINAL])).get(_TUPLE_ZONE, b""), "big")


def _moved(entry: dict[int, bytes], zone: int, family: int) -> bytes:
    """The request that makes the entry in another zone, with the same translation of addresses."""
    original, reply = _flat(entry[_ORIGINAL]), _flat(entry[_REPLY])
    parts = [_tuple(_ORIGINAL, original, zone), _tuple(_REPLY, _untranslated(original, reply, family))]
    source, destination = _ADDRESSES[family]
    ports = _PROTO_SRC_PORT in original
    # The answer's destination is what the source was made to be, and its source what the destination was.
    identity = next((kind for kind in _PROTO_IDS if kind in original), _PROTO_SRC_PORT)
    answered = _PROTO_DST_PORT if ports else identity
    if (reply[-destination], reply.get(answered)) != (original[-source], original.get(identity)):
        parts.append(_translation(_NAT_SRC, family, reply[-destination], reply.get(answered)))
    if (reply[-source], reply.get(_PROTO_SRC_PORT)) != (
        original[-destination],
        original.get(_PROTO_DST_PORT),
    ):
        parts.append(_translation(_NAT_DST, family, reply[-source], reply.get(_PROTO_SRC_PORT)))
    status = int.from_bytes(entry[_STATUS], "big") & _STATUS_KEPT
    parts.append(attribute(_STATUS, status.to_bytes(4, "big")))
    if _PROTOINFO in entry:
        parts.append(nest(_PROTOINFO, _liberal(entry[_PROTOINFO])))
    parts += [
        (nest if kind in _COPIED_NESTS else attribute)(kind, entry[kind]) for kind in _COPIED if kind in entry
    ]
    return b"".join(parts)


def _flat(payload: bytes) -> _Tuple:
    """A tuple's attributes in one place: those of the protocol by their type, addresses by its negative."""
    parts = dict(attributes(payload))
    flat = dict(attributes(parts[_TUPLE_PROTO]))
    return flat | {-kind: value for kind, value in attributes(parts[_TUPLE_IP])}


def _tuple(kind: int, flat: _Tuple, zone: int = 0) -> bytes:
    addresses = b"".join(attribute(-key, value) for key, value in flat.items() if key < 0)
    protocol = b"".join(attribute(key, value) for key, value in flat.items() if key > 0)
    body = nest(_TUPLE_IP, addresses) + nest(_TUPLE_PROTO, protocol)
    if zone:
        body += attribute(_TUPLE_ZONE, zone.to_bytes(2, "big"))
    return nest(kind, body)


def _untranslated(original: _Tuple, reply: _Tuple, family: int) -> _Tuple:
    """The answer as it would be without NAT: the kernel makes the rest of it, and remembers that it did."""
    source, destination = _ADDRESSES[family]
    swapped = {-source: original[-destination], -destination: original[-source]}
    if _PROTO_SRC_PORT in original:
        swapped |= {_PROTO_SRC_PORT: original[_PROTO_DST_PORT], _PROTO_DST_PORT: original[_PROTO_SRC_PORT]}
    swapped |= {kind: original[kind] for kind in _PROTO_IDS if kind in original}
    return reply | swapped


def _translation(kind: int, family: int, address: bytes, port: bytes | None) -> bytes:
    lowest, highest = _NAT_ADDRESSES[family]
    body = attribute(lowest, address) + attribute(highest, address)
    if port is not None:
        body += nest(_NAT_PROTO, attribute(_NAT_PORT_MIN, port) + attribute(_NAT_PORT_MAX, port))
    return nest(kind, body)


def _liberal(protoinfo: bytes) -> bytes:
    """Flags come with a mask that says which of them to set; a listing leaves it empty."""
    parts = dict(attributes(protoinfo))
    if _PROTOINFO_TCP not in parts:
        return protoinfo
    body = b""
    for kind, value in attributes(parts[_PROTOINFO_TCP]):
        flags = bytes((value[0] & _TCP_KEPT | _TCP_LIBERAL, _TCP_KEPT | _TCP_LIBERAL))
        body += attribute(kind, flags if kind in _TCP_FLAGS else value)
    return nest(_PROTOINFO_TCP, body)
