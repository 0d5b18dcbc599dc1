# SPDX-License-Identifier: Apache-2.0
"""A FIB for the reference model that reads the node's rules, too: `return_path: source` routes by source address."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from datapath.observe.packet import IpAddress
from datapath.observe.reference import ReversePath
from tests.bpf.conftest import run
from tests.bpf.routes import Route

_VERSIONS = (4, 6)


@dataclass(frozen=True, slots=True)
class Rule:
    """One ip rule, as a packet without a mark meets it; exactly one of `goto` and `table` is set, or none (nop)."""

    priority: int
    source: IPv4Network | IPv6Network | None
    destination: IPv4Network | IPv6Network | None
    goto: int | None
    table: str | None

    def matches(self, source: IpAddress, destination: IpAddress) -> bool:
        return (self.source is None or source in self.source) and (
            self.destination is None or destination in self.destination
        )


@dataclass(frozen=True, slots=True)
class NodeFib:
    """Rules and tables of a namespace in which every device forwards.

    Attributes:
        rules: by IP version, in the order of their priorities.
        tables: by IP version and name.
    """

    rules: Mapping[int, Sequence[Rule]]
    tables: Mapping[tuple[int, str], Sequence[Route]] = field(repr=False)

    def reverse_path(self, device: str, source: IpAddress, destination: IpAddress) -> ReversePath:
        """See `reference.Fib`: the reply goes from `destination` to `source`."""
        if source.version == 6 and (source.is_multicast or source.is_link_local or source.is_loopback):
            return ReversePath.NONE
        skip_to = 0
        for rule in self.rules[source.version]:
            if rule.priority < skip_to or not rule.matches(destination, source):
                continue
            skip_to = rule.goto or 0
            route = self._longest(rule.table, source) if rule.table else None
            if route is not None:
                if route.device is None:
                    return ReversePath.NONE
                return ReversePath.DEVICE if route.device == device else ReversePath.OTHER
        return ReversePath.NONE

    def _longest(self, table: str, address: IpAddress) -> Route | None:
        found = [route for route in self.tables[address.version, table] if address in route.prefix]
        return max(found, key=lambda route: (route.prefix.prefixlen, -route.metric), default=None)


def read_node_fib() -> NodeFib:
    """Rules and routes of the current namespace now."""
    rules = {version: _rules(version) for version in _VERSIONS}
    wanted = {(version, rule.table) for version, many in rules.items() for rule in many if rule.table}
    return NodeFib(
        {version: tuple(many) for version, many in rules.items()},
        {(version, table): _routes(version, table) for version, table in wanted if table},
    )


def _prefix(address: str, length: int | None, version: int) -> IPv4Network | IPv6Network | None:
    if address == "all":
        return None
    return ip_network(f"{address}/{(32 if version == 4 else 128) if length is None else length}")


def _rules(version: int) -> list[Rule]:
    entries: list[dict[str, Any]] = json.loads(run("ip", "-j", f"-{version}", "rule"))
    return [
        Rule(
            entry["priority"],
            _prefix(entry["src"], entry.get("srclen"), version),
            _prefix(entry.get("dst", "all"), entry.get("dstlen"), version),
            entry.get("goto"),
            entry.get("table"),
        )
        for entry in entries
        # No packet has a mark when its source is looked up. The table `default` is empty, and `ip` denies it exists.
        if int(entry.get("fwmark", "0"), 16) == 0 and entry.get("table") != "default"
    ]


def _routes(version: int, table: str) -> tuple[Route, ...]:
    entries = json.loads(run("ip", "-j", f"-{version}", "route", "show", "table", table))
    return tuple(
        Route(
            ip_network(("0.0.0.0/0", "::/0")[version == 6] if entry["dst"] == "default" else entry["dst"]),
            entry.get("metric", 0),
            entry["dev"] if entry.get("type", "unicast") == "unicast" else None,
        )
        for entry in entries
    )
