# SPDX-License-Identifier: Apache-2.0
"""A FIB for the reference model, read from what `ip route` says of the namespace."""

from __future__ import annotations

import json
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING

from datapath.observe.reference import ReversePath
from tests.bpf.conftest import run

if TYPE_CHECKING:
    from datapath.observe.packet import IpAddress


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route has a device; every other kind (local, broadcast, blackhole ...) leads nowhere."""

    prefix: IPv4Network | IPv6Network
    metric: int
    device: str | None


@dataclass(frozen=True, slots=True)
class RouteFib:
    """Rules `local`, `main`, `default` with nothing else, as in a new namespace.

    Attributes:
        tables: in the order of the rules; the first with a matching route decides.
        forwarding: devices and IP versions with forwarding on.
    """

    tables: tuple[tuple[Route, ...], ...]
    forwarding: frozenset[tuple[str, int]]

    def reverse_path(self, device: str, source: IpAddress, destination: IpAddress) -> ReversePath:
        """See `reference.Fib`."""
        del destination  # these rules ask for the destination of the lookup only
        if source.version == 6 and (source.is_multicast or source.is_link_local or source.is_loopback):
            return ReversePath.NONE
        if (device, source.version) not in self.forwarding:
            return ReversePath.UNKNOWN
        for table in self.tables:
            found = [route for route in table if source in route.prefix]
            if found:
                best = max(found, key=lambda route: (route.prefix.prefixlen, -route.metric))
                if best.device is None:
                    return ReversePath.NONE
                return ReversePath.DEVICE if best.device == device else ReversePath.OTHER
        return ReversePath.NONE


def _prefix(text: str, version: int) -> IPv4Network | IPv6Network:
    if text == "default":
        return ip_network("0.0.0.0/0" if version == 4 else "::/0")
    return ip_network(text)


def _table(name: str, version: int) -> list[Route]:
    entries = json.loads(run("ip", "-j", f"-{version}", "route", "show", "table", name))
    return [
        Route(
            prefix=_prefix(entry["dst"], version),
            metric=entry.get("metric", 0),
            device=entry["dev"] if entry.get("type", "unicast") == "unicast" else None,
        )
        for entry in entries
    ]


def read_fib(devices: tuple[str, ...], *, forwarding: tuple[tuple[str, int], ...]) -> RouteFib:
    """The namespace's routing now. A device not in `forwarding` has forwarding switched off."""
    for device in devices:
        for version in (4, 6):
            value = int((device, version) in forwarding)
            run("sysctl", "-qw", f"net.ipv{version}.conf.{device}.forwarding={value}")
    tables = tuple(
        tuple(route for version in (4, 6) for route in _table(name, version)) for name in ("local", "main")
    )
    return RouteFib(tables=tables, forwarding=frozenset(forwarding))
