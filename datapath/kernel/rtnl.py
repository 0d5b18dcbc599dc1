# SPDX-License-Identifier: Apache-2.0
"""Rules, routes and links through rtnetlink (pyroute2), in the current network namespace."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address, ip_interface, ip_network
from types import TracebackType
from typing import Any, Self

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from datapath.errors import KernelError
from datapath.facts import IpInterface, LinkFacts
from datapath.kernel.rtnl_dump import RtnlDump
from datapath.plan.ingress import IpNetwork, VlanProtocol
from datapath.plan.rtnl import ROUTE_PROTOCOL, Family, FibRule, Route, RouteType, RuleAction, VlanLink
from datapath.reconcile.actual import ActualLink, ForeignRule

AF = {Family.IPV4: socket.AF_INET, Family.IPV6: socket.AF_INET6}
_FAMILY = {number: family for family, number in AF.items()}
#: FR_ACT_* of linux/fib_rules.h.
_ACTIONS = {1: RuleAction.LOOKUP, 2: RuleAction.GOTO, 3: RuleAction.NOP}
#: RTN_* of linux/rtnetlink.h.
_ROUTE_TYPES = {1: RouteType.UNICAST, 7: RouteType.UNREACHABLE}
_VLAN_PROTOCOL = {0x8100: VlanProtocol.DOT1Q, 0x88A8: VlanProtocol.DOT1AD}
_IFF_UP = 1
_RTNH_F_ONLINK = 4
_PROTOCOL_NAMES = {
    2: "kernel",
    3: "boot",
    4: "static",
    11: "zebra (FRR)",
    12: "bird",
    16: "dhcp",
    80: "Calico",
}


class Rtnl:
    """One rtnetlink socket. Use as a context manager."""

    def __init__(self) -> None:
        self._dump = RtnlDump()
        self._changes: IPRoute | None = None
        self._names: dict[int, str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._dump.close()
        if self._changes is not None:
            self._changes.close()

    @property
    def _ipr(self) -> IPRoute:
        """Opened by the first change: it starts an event loop, which costs more than a whole dump."""
        if self._changes is None:
            self._changes = IPRoute()
        return self._changes

    def links(self) -> dict[str, ActualLink]:
        """All devices by name."""
        messages = list(self._dump.get_links())
        self._names = {message["index"]: message["IFLA_IFNAME"] for message in messages}
        return {link.name: link for link in (self._link(message) for message in messages)}

    def link_facts(self) -> tuple[LinkFacts, ...]:
        """Devices with their addresses, as the compiler may know them."""
        links = self.links()
        addresses: dict[str, list[IpInterface]] = {}
        for message in self._dump.get_addr():
            address = message.get("IFA_LOCAL") or message.get("IFA_ADDRESS")
            name = (self._names or {}).get(message["index"])
            if address and name:
                addresses.setdefault(name, []).append(ip_interface(f"{address}/{message['prefixlen']}"))
        return tuple(
            LinkFacts(
                name=link.name,
                kind=link.kind,
                parent=link.parent,
                vlan_id=link.vlan_id,
                vlan_protocol=link.vlan_protocol,
                up=link.up,
                addresses=tuple(
                    sorted(addresses.get(link.name, []), key=lambda a: (a.version, int(a), str(a)))
                ),
            )
            for link in sorted(links.values(), key=lambda link: link.name)
        )

    def _link(self, message: Any) -> ActualLink:
        info = message.get("IFLA_LINKINFO")
        kind = (info.get("IFLA_INFO_KIND") if info else None) or ""
        vlan_id = protocol = 0
        parent = ""
        if kind == "vlan":
            options = info.get("IFLA_INFO_DATA")
            vlan_id = options.get("IFLA_VLAN_ID") or 0
            # In network byte order on the wire; pyroute2 leaves it so.
            protocol = socket.ntohs(options.get("IFLA_VLAN_PROTOCOL") or 0)
            parent = (self._names or {}).get(message.get("IFLA_LINK"), "")
        # A VRF takes routing over, every other master the packets themselves.
        slave_kind = (info.get("IFLA_INFO_SLAVE_KIND") if info else None) or "vrf"
        master = message.get("IFLA_MASTER") if slave_kind != "vrf" else None
        return ActualLink(
            message.get("IFLA_IFNAME"),
            bool(message["flags"] & _IFF_UP),
            kind,
            parent,
            vlan_id,
            protocol,
            port_of=(self._names or {}).get(master, "") if master else "",
        )

    def rules(self) -> tuple[frozenset[FibRule], tuple[ForeignRule, ...]]:
        """Our rules, and everybody else's."""
        ours: set[FibRule] = set()
        foreign: list[ForeignRule] = []
        for family, number in AF.items():
            for message in self._dump.get_rules(family=number):
                rule = _own_rule(message, family) if message.get("FRA_PROTOCOL") == ROUTE_PROTOCOL else None
                if rule is not None:
                    ours.add(rule)
                else:
                    foreign.append(_foreign_rule(message, family))
        return frozenset(ours), tuple(foreign)

    def routes(self) -> frozenset[Route]:
        """Our routes, by protocol id, in all tables."""
        found: set[Route] = set()
        for number in AF.values():
            for message in self._dump.get_routes(family=number, proto=ROUTE_PROTOCOL):
                if message["proto"] == ROUTE_PROTOCOL:
                    found.add(self._route(message))
        return frozenset(found)

    def foreign_routes(self, tables: Iterable[int]) -> dict[int, str]:
        """Tables among those asked that hold routes of others, with one example each."""
        found: dict[int, str] = {}
        for table in tables:
            for number in AF.values():
                for message in self._dump.get_routes(family=number, table=table):
                    if message["proto"] != ROUTE_PROTOCOL:
                        owner = _PROTOCOL_NAMES.get(message["proto"], f"protocol {message['proto']}")
                        found.setdefault(table, f"{self._route(message).destination} by {owner}")
        return found

    def _route(self, message: Any) -> Route:
        family = _FAMILY[message["family"]]
        route_type = _ROUTE_TYPES.get(message["type"], RouteType.UNICAST)
        oif = message.get("RTA_OIF")
        # IPv6 hangs reject routes on the loopback device; IPv4 has none there.
        device = "" if route_type is RouteType.UNREACHABLE or oif is None else self._name(oif)
        gateway = message.get("RTA_GATEWAY")
        return Route(
            message.get("RTA_TABLE") or message["table"],
            _prefix(message.get("RTA_DST"), message["dst_len"], family),
            device,
            ip_address(gateway) if gateway else None,
            route_type,
            message.get("RTA_PRIORITY") or 0,
        )

    def _name(self, index: int) -> str:
        if self._names is None or index not in self._names:
            self.links()
        return (self._names or {}).get(index, f"ifindex {index}")

    def index(self, name: str) -> int:
        """Resolve a device to its ifindex.

        Raises:
            KernelError: there is no such device.
        """
        try:
            return socket.if_nametoindex(name)
        except OSError as error:
            raise KernelError(
                f"find device {name}",
                "no such device",
                errno=error.errno or 0,
                hint="create it, or use `vlan:`",
            ) from error

    def add_rule(self, rule: FibRule) -> None:
        with _refusals("add rule", rule.render()):
            self._ipr.rule("add", **_rule_request(rule))

    def delete_rule(self, rule: FibRule) -> None:
        with _refusals("delete rule", rule.render()):
            self._ipr.rule("del", **_rule_request(rule))

    def add_route(self, route: Route, *, replace: bool) -> None:
        with _refusals("add route", route.render()):
            self._ipr.route("replace" if replace else "add", **self._route_request(route))

    def delete_route(self, route: Route) -> None:
        with _refusals("delete route", route.render()):
            self._ipr.route("del", **self._route_request(route))

    def add_vlan(self, link: VlanLink) -> None:
        with _refusals("add VLAN device", link.render()):
            self._ipr.link(
                "add",
                ifname=link.name,
                kind="vlan",
                link=self.index(link.parent),
                vlan_id=link.vlan_id,
                vlan_protocol=int(link.protocol),
            )
            self._ipr.link("set", index=self.index(link.name), state="up")

    def set_up(self, name: str) -> None:
        with _refusals("set link up", name):
            self._ipr.link("set", index=self.index(name), state="up")

    def delete_link(self, name: str) -> None:
        with _refusals("delete link", name):
            self._ipr.link("del", index=self.index(name))

    def _route_request(self, route: Route) -> dict[str, Any]:
        request: dict[str, Any] = {
            "family": AF[route.family],
            "dst": str(route.destination),
            "table": route.table,
            "proto": ROUTE_PROTOCOL,
            "priority": route.metric,
            "type": str(route.type),
        }
        if route.device:
            request["oif"] = self.index(route.device)
            request["scope"] = 0 if route.gateway or route.family is Family.IPV6 else 253
        if route.gateway:
            request |= {"gateway": str(route.gateway), "flags": _RTNH_F_ONLINK}
        return request


def _rule_request(rule: FibRule) -> dict[str, Any]:
    request: dict[str, Any] = {
        "family": AF[rule.family],
        "priority": rule.priority,
        "action": {RuleAction.LOOKUP: "to_tbl"}.get(rule.action, str(rule.action)),
        "protocol": ROUTE_PROTOCOL,
    }
    if rule.action is RuleAction.LOOKUP:
        request["table"] = rule.target
    elif rule.action is RuleAction.GOTO:
        request["goto"] = rule.target
    if rule.fwmask:
        request |= {"fwmark": rule.fwmark, "fwmask": rule.fwmask}
    for side, network in (("src", rule.source), ("dst", rule.destination)):
        if network is not None:
            request |= {side: str(network.network_address), f"{side}_len": network.prefixlen}
    return request


def _own_rule(message: Any, family: Family) -> FibRule | None:
    action = _ACTIONS.get(message["action"])
    if action is None:
        return None
    target = 0
    if action is RuleAction.LOOKUP:
        target = message.get("FRA_TABLE") or message["table"]
    elif action is RuleAction.GOTO:
        target = message.get("FRA_GOTO") or 0
    return FibRule(
        family,
        message.get("FRA_PRIORITY") or 0,
        action,
        target,
        message.get("FRA_FWMARK") or 0,
        message.get("FRA_FWMASK") or 0,
        _selector(message, "FRA_SRC", "src_len", family),
        _selector(message, "FRA_DST", "dst_len", family),
    )


def _foreign_rule(message: Any, family: Family) -> ForeignRule:
    priority = message.get("FRA_PRIORITY") or 0
    table = message.get("FRA_TABLE") or message["table"]
    mark, mask = message.get("FRA_FWMARK") or 0, message.get("FRA_FWMASK") or 0
    words = [f"ip -{family} rule {priority}:"]
    for word, attribute, length in (("from", "FRA_SRC", "src_len"), ("to", "FRA_DST", "dst_len")):
        network = _selector(message, attribute, length, family)
        if network is not None:
            words.append(f"{word} {network}")
    if mask:
        words.append(f"fwmark {mark:#x}/{mask:#x}")
    words.append(f"lookup {table}")
    protocol = message.get("FRA_PROTOCOL") or 0
    return ForeignRule(family, priority, mark, mask, table, protocol, " ".join(words))


def _selector(message: Any, attribute: str, length: str, family: Family) -> IpNetwork | None:
    if not message[length]:
        return None
    return _prefix(message.get(attribute), message[length], family)


def _prefix(address: str | None, length: int, family: Family) -> IpNetwork:
    zero = "0.0.0.0" if family is Family.IPV4 else "::"  # noqa: S104  (the default route, not a socket)
    return ip_network(f"{address or zero}/{length}", strict=False)


@contextmanager
def _refusals(operation: str, what: str) -> Iterator[None]:
    """Turn the kernel's refusal into words."""
    try:
        yield
    except NetlinkError as error:
        hints: Mapping[int, str] = {
            1: "datapath needs CAP_NET_ADMIN: run it as root",
            17: "somebody else has the same one: `ip route show table all` and `ip rule` tell who (proto)",
            95: "this kernel lacks the feature (is the 8021q module there?)",
            100: "the device is down: set it up, or let `vlan:` make it",
            101: "the gateway is not reachable on this device: is it up?",
        }
        raise KernelError(
            operation, f"{error.args[1]} ({what})", errno=error.code, hint=hints.get(error.code, "")
        ) from error
