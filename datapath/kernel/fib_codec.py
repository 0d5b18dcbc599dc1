# SPDX-License-Identifier: Apache-2.0
"""Rules and routes as rtnetlink bodies, both ways.

A node with 4,094 networks has 11,000 rules and 29,000 routes, and a daemon reads them often. The kernel writes the
attributes of alike objects in the same order, so a body is unpacked by one `struct` for its shape, and every
attribute header is compared afterwards: a body of another shape is looked at attribute by attribute, once.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from operator import itemgetter
from typing import Any, Final

from datapath.kernel.netlink_messages import ATTRIBUTE, attributes
from datapath.plan.ingress import IpNetwork
from datapath.plan.rtnl import ROUTE_PROTOCOL, Family, FibRule, NextHop, Route, RouteType, RuleAction
from datapath.reconcile.actual import ForeignRule

AF: Final = {Family.IPV4: int(socket.AF_INET), Family.IPV6: int(socket.AF_INET6)}
#: struct fib_rule_hdr and struct rtmsg have the same size: eight bytes and a word of flags.
FIB_HEADER: Final = struct.Struct("=8BI")
#: FR_ACT_* of linux/fib_rules.h.
_ACTIONS: Final = {1: RuleAction.LOOKUP, 2: RuleAction.GOTO, 3: RuleAction.NOP}
_ACTION_NUMBERS: Final = {action: number for number, action in _ACTIONS.items()}
#: RTN_* of linux/rtnetlink.h.
_ROUTE_TYPES: Final = {1: RouteType.UNICAST, 7: RouteType.UNREACHABLE}
_ROUTE_TYPE_NUMBERS: Final = {kind: number for number, kind in _ROUTE_TYPES.items()}
#: RT_TABLE_COMPAT: the number is in the attribute.
_TABLE_ELSEWHERE: Final = 252
_SCOPE_UNIVERSE, _SCOPE_LINK = 0, 253
_RTNH_F_ONLINK: Final = 4

_FRA_DST, _FRA_SRC, _FRA_IIFNAME, _FRA_GOTO, _FRA_PRIORITY, _FRA_FWMARK = 1, 2, 3, 4, 6, 10
_FRA_TABLE, _FRA_FWMASK, _FRA_L3MDEV, _FRA_PROTOCOL = 15, 16, 19, 21
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_MULTIPATH, _RTA_TABLE = 1, 4, 5, 6, 9, 15

_U32: Final = struct.Struct("=HHI")
_TWO_U32: Final = struct.Struct("=HHIHHI")
_RULE_HEAD: Final = struct.Struct("=8BIHHIHHB3x")
_ROUTE_HEAD: Final = struct.Struct("=8BIHHIHHI")
#: struct rtnexthop: length, flags, weight - 1, ifindex.
_NEXT_HOP: Final = struct.Struct("=HBBi")

_Values = tuple[Any, ...]
#: Formats of attributes that are numbers, by size.
_NUMBERS: Final = {1: "B", 4: "I"}


def encode_rule(rule: FibRule) -> bytes:
    """Body of RTM_NEWRULE and RTM_DELRULE."""
    source, destination = rule.source, rule.destination
    body = _RULE_HEAD.pack(
        AF[rule.family],
        destination.prefixlen if destination else 0,
        source.prefixlen if source else 0,
        0,
        _TABLE_ELSEWHERE if rule.action is RuleAction.LOOKUP else 0,
        0,
        0,
        _ACTION_NUMBERS[rule.action],
        0,
        8,
        _FRA_PRIORITY,
        rule.priority,
        5,
        _FRA_PROTOCOL,
        ROUTE_PROTOCOL,
    )
    if rule.action is RuleAction.LOOKUP:
        body += _U32.pack(8, _FRA_TABLE, rule.target)
    elif rule.action is RuleAction.GOTO:
        body += _U32.pack(8, _FRA_GOTO, rule.target)
    if rule.fwmask:
        body += _TWO_U32.pack(8, _FRA_FWMARK, rule.fwmark, 8, _FRA_FWMASK, rule.fwmask)
    if source:
        body += _address(_FRA_SRC, source.network_address)
    if destination:
        body += _address(_FRA_DST, destination.network_address)
    if rule.device:
        name = rule.device.encode() + b"\0"
        body += ATTRIBUTE.pack(4 + len(name), _FRA_IIFNAME) + name + bytes(-len(name) % 4)
    return body


def encode_route(route: Route, device: int) -> bytes:
    """Body of RTM_NEWROUTE and RTM_DELROUTE.

    Args:
        route: ours.
        device: ifindex of its device, 0 where it has none.
    """
    family, gateway, destination = route.family, route.gateway, route.destination
    is_direct = device and gateway is None and not route.hops and family is Family.IPV4
    body = _ROUTE_HEAD.pack(
        AF[family],
        destination.prefixlen,
        0,
        0,
        _TABLE_ELSEWHERE,
        ROUTE_PROTOCOL,
        _SCOPE_LINK if is_direct else _SCOPE_UNIVERSE,
        _ROUTE_TYPE_NUMBERS[route.type],
        _RTNH_F_ONLINK if gateway else 0,
        8,
        _RTA_TABLE,
        route.table,
        8,
        _RTA_PRIORITY,
        route.metric,
    )
    if destination.prefixlen:
        body += _address(_RTA_DST, destination.network_address)
    if route.hops:
        # One with hops on several devices is never ours to add; to delete it, its key will do.
        return body if any(hop.device for hop in route.hops) else body + _hops(route.hops, device)
    if device:
        body += _U32.pack(8, _RTA_OIF, device)
    if gateway:
        body += _address(_RTA_GATEWAY, gateway)
    return body


def _hops(hops: tuple[NextHop, ...], device: int) -> bytes:
    payload = b""
    for hop in hops:
        gateway = _address(_RTA_GATEWAY, hop.gateway)
        payload += (
            _NEXT_HOP.pack(_NEXT_HOP.size + len(gateway), _RTNH_F_ONLINK, hop.weight - 1, device) + gateway
        )
    return ATTRIBUTE.pack(4 + len(payload), _RTA_MULTIPATH) + payload


def _address(kind: int, address: IPv4Address | IPv6Address) -> bytes:
    packed = address.packed
    return ATTRIBUTE.pack(4 + len(packed), kind) + packed


class RuleDecoder:
    """Bodies of RTM_NEWRULE of one family as rules. Keeps nothing between dumps but the shapes."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._networks = _Networks(family)
        # Behind the fixed part, in this order.
        self._unpack = _Unpacker(
            (
                _FRA_PRIORITY,
                _FRA_TABLE,
                _FRA_GOTO,
                _FRA_FWMARK,
                _FRA_FWMASK,
                _FRA_SRC,
                _FRA_DST,
                _FRA_PROTOCOL,
                _FRA_IIFNAME,
                _FRA_L3MDEV,
            ),
            frozenset({_FRA_SRC, _FRA_DST, _FRA_IIFNAME}),
        )

    def decode(self, bodies: Iterable[bytes]) -> tuple[list[FibRule], list[ForeignRule]]:
        """Our rules, and everybody else's."""
        ours: list[FibRule] = []
        foreign: list[ForeignRule] = []
        family, network, unpack = self._family, self._networks.get, self._unpack.values
        for body in bodies:
            fixed, priority, table, goto, mark, mask, source, destination, protocol, name, l3mdev = unpack(
                body
            )
            to_length, from_length, small_table, number = fixed[1], fixed[2], fixed[4], fixed[7]
            table = table or small_table
            is_ours = protocol == ROUTE_PROTOCOL and number in _ACTIONS
            rule = FibRule(
                family,
                priority,
                _ACTIONS[number] if is_ours else RuleAction.LOOKUP,
                table if number == 1 or not is_ours else goto,
                mark,
                mask,
                network(source, from_length) if from_length else None,
                network(destination, to_length) if to_length else None,
                name.rstrip(b"\0").decode(errors="replace") if name else "",
            )
            if is_ours:
                ours.append(rule)
            else:
                foreign.append(_foreign_rule(rule, protocol, is_l3mdev=bool(l3mdev)))
        return ours, foreign


def _foreign_rule(rule: FibRule, protocol: int, *, is_l3mdev: bool) -> ForeignRule:
    """Somebody's rule, told as a look-up whatever it does."""
    words = [f"ip -{rule.family} rule {rule.priority}:"]
    for word, network in (("from", rule.source), ("to", rule.destination)):
        if network is not None:
            words.append(f"{word} {network}")
    if rule.device:
        words.append(f"iif {rule.device}")
    if rule.fwmask:
        words.append(f"fwmark {rule.fwmark:#x}/{rule.fwmask:#x}")
    words.append("lookup [l3mdev-table]" if is_l3mdev else f"lookup {rule.target}")
    return ForeignRule(
        rule.family,
        rule.priority,
        rule.fwmark,
        rule.fwmask,
        rule.target,
        protocol,
        " ".join(words),
        is_l3mdev,
    )


class RouteDecoder:
    """Bodies of RTM_NEWROUTE of one family as routes.

    Args:
        family: of the dump.
        name: of a device by its ifindex.
    """

    def __init__(self, family: Family, name: Callable[[int], str]) -> None:
        self._name = name
        self._networks = _Networks(family)
        self._address = IPv4Address if family is Family.IPV4 else IPv6Address
        self._unpack = _Unpacker(
            (_RTA_TABLE, _RTA_DST, _RTA_PRIORITY, _RTA_OIF, _RTA_GATEWAY, _RTA_MULTIPATH),
            frozenset({_RTA_DST, _RTA_GATEWAY, _RTA_MULTIPATH}),
        )

    def decode(self, bodies: Iterable[bytes]) -> Iterator[tuple[int, Route]]:
        """Protocol and route."""
        network, name, address, unpack = self._networks.get, self._name, self._address, self._unpack.values
        for body in bodies:
            fixed, table, destination, metric, device, gateway, multipath = unpack(body)
            kind = _ROUTE_TYPES.get(fixed[7], RouteType.UNICAST)
            hops: tuple[NextHop, ...] = ()
            if multipath:
                device, hops = self._hops(multipath)
            # IPv6 hangs reject routes on the loopback device; IPv4 has none there.
            has_device = device and kind is not RouteType.UNREACHABLE
            yield (
                fixed[5],
                Route(
                    table or fixed[4],
                    network(destination, fixed[1]),
                    name(device) if has_device else "",
                    address(gateway) if gateway else None,
                    kind,
                    metric,
                    hops,
                ),
            )

    def _hops(self, payload: bytes) -> tuple[int, tuple[NextHop, ...]]:
        """The device of the first hop, and all hops."""
        hops: list[NextHop] = []
        offset, first = 0, 0
        while offset + _NEXT_HOP.size <= len(payload):
            length, _, more, device = _NEXT_HOP.unpack_from(payload, offset)
            if length < _NEXT_HOP.size:
                break
            found = dict(attributes(payload[offset : offset + length], _NEXT_HOP.size))
            gateway = found.get(_RTA_GATEWAY, bytes(4))
            first = first or device
            hops.append(
                NextHop(self._address(gateway), more + 1, self._name(device) if device != first else "")
            )
            offset += (length + 3) & ~3
        return first, tuple(hops)


class _Networks:
    """Prefixes of one family; making one takes longer than all the rest of a route."""

    def __init__(self, family: Family) -> None:
        self._make = IPv4Network if family is Family.IPV4 else IPv6Network
        self._zero = bytes(4 if family is Family.IPV4 else 16)
        self._known: dict[tuple[bytes | int, int], IpNetwork] = {}

    def get(self, address: bytes | int, length: int) -> IpNetwork:
        """The prefix; the address is 0 where the kernel says none."""
        key = (address, length)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._make((address or self._zero, length), strict=False)
        return found


class _Unpacker:
    """Values of attributes, in an order of the caller's choice, behind the first eight bytes of the fixed part.

    Args:
        kinds: attributes; the value of one that is missing is 0.
        as_bytes: those whose payload is not a number.
    """

    def __init__(self, kinds: tuple[int, ...], as_bytes: frozenset[int]) -> None:
        self._kinds = kinds
        self._as_bytes = as_bytes
        self._shapes: dict[int, _Shape] = {}

    def values(self, body: bytes) -> _Values:
        """Eight bytes, then the value of each attribute."""
        # Length, the lengths of the prefixes (without one there is no address) and the last fixed byte (action of a
        # rule, type of a route) tell nearly all shapes apart.
        key = len(body) << 24 | body[1] << 16 | body[2] << 8 | body[7]
        shape = self._shapes.get(key)
        if shape is not None:
            fields = shape.unpack(body)
            if fields[1::2] == shape.headers:
                return shape.pick((*fields, 0))
        shape = self._shapes[key] = _Shape(body, self._kinds, self._as_bytes)
        return shape.pick((*shape.unpack(body), 0))


class _Shape:
    """One sequence of attributes, by kind and length.

    Attributes:
        unpack: eight bytes, then header and value of each attribute.
        headers: as they must be again.
        pick: what is asked for, of all that and a zero behind it.
    """

    __slots__ = ("headers", "pick", "unpack")

    def __init__(self, body: bytes, kinds: tuple[int, ...], as_bytes: frozenset[int]) -> None:
        layout, positions = ["=8s4x"], {}
        offset, field, end = FIB_HEADER.size, 2, len(body)
        while offset + 4 <= end:
            length, kind = ATTRIBUTE.unpack_from(body, offset)
            if not 4 <= length <= end - offset:
                break
            size, following = length - 4, min(offset + (length + 3 & ~3), end)
            is_number = size in _NUMBERS and kind not in as_bytes
            layout.append(f"4s{_NUMBERS[size] if is_number else f'{size}s'}{following - offset - length}x")
            if is_number or kind in as_bytes:
                positions[kind] = field
            offset, field = following, field + 2
        layout.append(f"{end - offset}x")
        self.unpack = struct.Struct("".join(layout)).unpack
        self.headers = self.unpack(body)[1::2]
        self.pick: Callable[[_Values], _Values] = itemgetter(0, *(positions.get(kind, -1) for kind in kinds))
