# SPDX-License-Identifier: Apache-2.0
"""Rules, routes and links through rtnetlink, in the current network namespace.

Rules and routes come and go by the thousand: raw messages, many in one system call. Devices are made through
pyroute2 (`vlan_links.py`), which is loaded by the first one.
"""

from __future__ import annotations

import enum
import errno
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from datapath.errors import KernelError
from datapath.facts import LinkFacts
from datapath.kernel.fib_codec import AF, RouteDecoder, RuleDecoder, encode_route, encode_rule
from datapath.kernel.netlink import F_CREATE, F_EXCL, F_REPLACE, Netlink, Request
from datapath.kernel.recall import Recall, SetRecall, digest_of
from datapath.kernel.rtnl_dump import (
    actual_link,
    addresses_in,
    dump_addresses,
    dump_links,
    dump_routes,
    dump_rules,
    ipv4_settings,
    link_facts,
    link_message,
    raw_routes,
)
from datapath.plan.rtnl import ROUTE_PROTOCOL, Family, FibRule, Route, Slave, VlanLink, VrfLink
from datapath.reconcile.actual import ActualLink, ForeignRule

if TYPE_CHECKING:
    from datapath.kernel.vlan_links import VlanLinks

_NEWROUTE, _DELROUTE, _NEWRULE, _DELRULE = 24, 25, 32, 33
_RTPROT_KERNEL: Final = 2
_PROTOCOL_NAMES: Final = {
    _RTPROT_KERNEL: "kernel",
    3: "boot",
    4: "static",
    11: "zebra (FRR)",
    12: "bird",
    16: "dhcp",
    80: "Calico",
    186: "BGP (FRR)",
}
_HINTS: Final[Mapping[int, str]] = {
    1: "datapath needs CAP_NET_ADMIN: run it as root",
    17: "somebody else has the same one: `ip route show table all` and `ip rule` tell who (proto)",
    95: "this kernel lacks the feature (is the module there: 8021q, vrf?)",
    100: "the device is down: set it up, or let `vlan:` make it",
    101: "the gateway is not reachable on this device: is it up?",
}

#: What was found last.
ROUTES: Final[SetRecall[Route]] = SetRecall()
RULES: Final[SetRecall[FibRule]] = SetRecall()


class Verb(enum.StrEnum):
    """What to do with a rule or route. A rule cannot be replaced."""

    ADD = "add"
    REPLACE = "replace"
    DELETE = "delete"


_FLAGS: Final = {Verb.ADD: F_CREATE | F_EXCL, Verb.REPLACE: F_CREATE | F_REPLACE, Verb.DELETE: 0}


@dataclass(frozen=True, slots=True)
class FibChange:
    """One rule or route to come or to go."""

    verb: Verb
    item: FibRule | Route

    def refusal(self, number: int, reason: str) -> KernelError:
        verb = Verb.DELETE if self.verb is Verb.DELETE else Verb.ADD
        noun = "rule" if isinstance(self.item, FibRule) else "route"
        return refusal(f"{verb} {noun}", self.item.render(), number, reason)


class Devices(NamedTuple):
    """All devices of one dump.

    Attributes:
        links: by name.
        names: by ifindex.
        settings: by name, their IPv4 sysctls as far as the dump tells them; for who looks at them at once.
    """

    links: dict[str, ActualLink]
    names: dict[int, str]
    settings: Mapping[str, Mapping[str, str]]

    @property
    def indexes(self) -> dict[str, int]:
        """Ifindexes by name."""
        return {name: index for index, name in self.names.items()}


DEVICES: Final[Recall[Devices]] = Recall()
LINK_FACTS: Final[Recall[tuple[LinkFacts, ...]]] = Recall()
_RULES_OF_OTHERS: Final[Recall[tuple[ForeignRule, ...]]] = Recall()


class Rtnl:
    """One rtnetlink socket. Use as a context manager."""

    def __init__(self) -> None:
        self._netlink = Netlink()
        self._vlan_links: VlanLinks | None = None
        self._names: dict[int, str] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._netlink.close()
        if self._vlan_links is not None:
            self._vlan_links.close()

    def devices(self) -> Devices:
        """All devices."""
        dump = dump_links(self._netlink)
        known = DEVICES.of(dump.digest)
        if known is not None:
            return known
        messages = [link_message(body) for body in dump.bodies()]
        names = {message.ifindex: message.name for message in messages}
        links = {message.name: actual_link(message, names) for message in messages}
        settings = {message.name: ipv4_settings(message.settings) for message in messages}
        found = Devices(links, names, settings)
        DEVICES.keep(dump.digest, found)
        return found

    def links(self) -> dict[str, ActualLink]:
        """All devices by name."""
        return self.devices().links

    def link_facts(self, devices: Devices | None = None) -> tuple[LinkFacts, ...]:
        """Devices with their addresses, as the compiler may know them; `devices` if they were read before."""
        devices = devices or self.devices()
        dump = dump_addresses(self._netlink)
        known = LINK_FACTS.of(dump.digest, devices.links)
        if known is not None:
            return known
        addresses: dict[str, list[str]] = {}
        for index, address in addresses_in(dump.bodies()):
            name = devices.names.get(index)
            if name:
                addresses.setdefault(name, []).append(address)
        found = link_facts(devices.links.values(), addresses)
        LINK_FACTS.keep(dump.digest, found, devices.links)
        return found

    def rules(self) -> tuple[frozenset[FibRule], tuple[ForeignRule, ...]]:
        """Our rules, and everybody else's."""
        dumps = {family: dump_rules(self._netlink, number) for family, number in AF.items()}
        digest = digest_of(dumps.values())
        known, others = RULES.of(digest), _RULES_OF_OTHERS.of(digest)
        if known is not None and others is not None:
            return known, others
        ours: set[FibRule] = set()
        foreign: list[ForeignRule] = []
        for family, dump in dumps.items():
            found, theirs = RuleDecoder(family).decode(dump.bodies())
            ours.update(found)
            foreign += theirs
        rules, others, digest = frozenset(ours), tuple(foreign), digest_of(dumps.values())
        RULES.keep(digest, rules)
        _RULES_OF_OTHERS.keep(digest, others)
        return rules, others

    def all_routes(self, devices: Devices) -> frozenset[Route]:
        """Our routes of all tables; `devices` as they were read before."""
        dumps = {
            family: raw_routes(self._netlink, number, protocol=ROUTE_PROTOCOL)
            for family, number in AF.items()
        }
        known = ROUTES.of(digest_of(dumps.values()), devices.names)
        if known is not None:
            return known
        self._names = dict(devices.names)
        found = frozenset(
            route for family, dump in dumps.items() for route in self._ours(family, dump.bodies())
        )
        # Of a device that came meanwhile the name was asked for.
        if self._names == devices.names:
            ROUTES.keep(digest_of(dumps.values()), found, devices.names)
        return found

    def _ours(self, family: Family, bodies: list[bytes]) -> Iterator[Route]:
        for protocol, route in RouteDecoder(family, self._name).decode(bodies):
            if protocol == ROUTE_PROTOCOL:
                yield route

    def routes(self, devices: Devices | None = None, tables: Iterable[int] = (0,)) -> frozenset[Route]:
        """Our routes, by protocol id.

        Args:
            devices: if they were read before.
            tables: 0 stands for all of them.
        """
        if devices is not None:
            self._names = dict(devices.names)
        return frozenset(
            route
            for family, number in AF.items()
            for table in tables
            for route in self._ours(
                family, dump_routes(self._netlink, number, protocol=ROUTE_PROTOCOL, table=table)
            )
        )

    def foreign_routes(self, tables: Iterable[int], *, by_kernel: bool = True) -> dict[int, str]:
        """Tables among those asked that hold routes of others, with one example each.

        Args:
            tables: which.
            by_kernel: others are also the kernel's own routes of addresses, which are in the table of a VRF.
        """
        ours = {ROUTE_PROTOCOL} if by_kernel else {ROUTE_PROTOCOL, _RTPROT_KERNEL}
        found: dict[int, str] = {}
        for table in tables:
            for family, number in AF.items():
                bodies = dump_routes(self._netlink, number, table=table)
                for protocol, route in RouteDecoder(family, self._name).decode(bodies):
                    if protocol not in ours:
                        owner = _PROTOCOL_NAMES.get(protocol, f"protocol {protocol}")
                        found.setdefault(table, f"{route.destination} by {owner}")
        return found

    def _name(self, index: int) -> str:
        if index not in self._names:
            self._names = dict(self.devices().names)
            # One that is gone meanwhile is asked for once.
            self._names.setdefault(index, f"ifindex {index}")
        return self._names[index]

    def change(self, changes: Sequence[FibChange]) -> None:
        """Carry out in order, many in one system call. A refused one does not stop those after it.

        Raises:
            KernelError: the first refusal, or a device is missing; then nothing was changed.
        """
        indexes: dict[str, int] = {}
        refusals = self._netlink.change([_request(change, indexes) for change in changes])
        if refusals:
            first = refusals[0]
            raise changes[first.number].refusal(first.errno, first.reason)

    @property
    def vlan_links(self) -> VlanLinks:
        """Opened by the first use: the library takes 10 MB and starts an event loop."""
        if self._vlan_links is None:
            from datapath.kernel.vlan_links import VlanLinks  # noqa: PLC0415

            self._vlan_links = VlanLinks()
        return self._vlan_links

    def add_link(self, link: VlanLink | VrfLink) -> None:
        self.vlan_links.add(link)

    def enslave(self, slave: Slave) -> None:
        self.vlan_links.enslave(slave)

    def release(self, device: str) -> None:
        self.vlan_links.release(device)

    def set_up(self, name: str) -> None:
        self.vlan_links.set_up(name)

    def delete_link(self, name: str) -> None:
        self.vlan_links.delete(name)


def _request(change: FibChange, indexes: dict[str, int]) -> Request:
    """The message; `indexes` remembers devices within a batch."""
    item, is_delete = change.item, change.verb is Verb.DELETE
    if isinstance(item, FibRule):
        return Request(_DELRULE if is_delete else _NEWRULE, _FLAGS[change.verb], encode_rule(item))
    index = 0
    if item.device:
        index = indexes.get(item.device) or indexes.setdefault(item.device, ifindex(item.device))
    return Request(_DELROUTE if is_delete else _NEWROUTE, _FLAGS[change.verb], encode_route(item, index))


def ifindex(name: str) -> int:
    """Resolve a device to its ifindex.

    Raises:
        KernelError: there is no such device.
    """
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        # The C library's error number does not get through `socket`.
        raise KernelError(
            f"find device {name}", "no such device", errno=errno.ENODEV, hint="create it, or use `vlan:`"
        ) from error


def refusal(operation: str, what: str, number: int, reason: str) -> KernelError:
    """The kernel's no, with what can be done about it."""
    return KernelError(operation, f"{reason} ({what})", errno=number, hint=_HINTS.get(number, ""))
