# SPDX-License-Identifier: Apache-2.0
"""Devices, ip rules and routes, as far as our steps meet them, with the kernel's own quirks.

What is modelled was read in net/core/fib_rules.c, net/ipv4/fib_trie.c, net/ipv6/ip6_fib.c and net/8021q, and is
compared with the running kernel by tests/faults/test_fake_kernel.py.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from datapath.errors import KernelError
from datapath.kernel.rtnl import FibChange, Verb
from datapath.plan.rtnl import Family, FibRule, Route, RuleAction, VlanLink, VrfLink
from datapath.reconcile.actual import ActualLink
from tests.fake_kernel.refusal import refuse


@dataclass
class Links:
    """Devices by name. A device that is made again gets another ifindex."""

    by_name: dict[str, ActualLink] = field(default_factory=dict)
    indexes: dict[str, int] = field(default_factory=dict)
    last_index: int = 0

    def copy(self) -> Links:
        return Links(dict(self.by_name), dict(self.indexes), self.last_index)

    def put(self, link: ActualLink) -> None:
        """A device, without asking."""
        self.last_index += 1
        self.by_name[link.name] = link
        self.indexes[link.name] = self.last_index

    def require(self, name: str) -> ActualLink:
        if name not in self.by_name:
            raise refuse(f"find device {name}", errno.ENODEV)
        return self.by_name[name]

    def add_vlan(self, link: VlanLink) -> None:
        """Make and set up: where the second is refused, the device stays, as in the kernel."""
        self.require(link.parent)
        vlan = (link.parent, link.vlan_id, int(link.protocol))
        taken = {(other.parent, other.vlan_id, other.vlan_protocol) for other in self.by_name.values()}
        if link.name in self.by_name or vlan in taken:
            raise refuse("add VLAN device", errno.EEXIST)
        self.put(ActualLink(link.name, False, "vlan", *vlan))
        self.set_up(link.name)

    def add_vrf(self, link: VrfLink) -> None:
        if link.name in self.by_name:
            raise refuse("add VRF", errno.EEXIST)
        self.put(ActualLink(link.name, True, "vrf", vrf_table=link.table))

    def move(self, device: str, vrf: str) -> frozenset[str]:
        """Into a VRF, or out of any; the device goes down and up. Returns the devices whose routes are lost."""
        link = self.require(device)
        if vrf:
            self.require(vrf)
        self.by_name[device] = dataclasses.replace(link, vrf=vrf)
        return self._with_uppers(device) if link.vrf != vrf else frozenset()

    def set_up(self, name: str) -> None:
        link = self.require(name)
        if link.kind == "vlan" and not self.by_name[link.parent].up:
            raise refuse("set link up", errno.ENETDOWN)
        self._set(name, up=True)

    def set_down(self, name: str) -> frozenset[str]:
        """Somebody sets a device down, and the kernel all VLAN devices on it; returns all of them."""
        self.require(name)
        family = self._with_uppers(name)
        for member in family:
            self._set(member, up=False)
        return family

    def delete(self, name: str) -> frozenset[str]:
        """Remove a device; the VLAN devices on it go along. Returns all that went, or lost their routes."""
        if self.require(name).kind == "vrf":
            slaves = [link.name for link in self.by_name.values() if link.vrf == name]
            moved = [self.move(slave, "") for slave in slaves]
            del self.by_name[name], self.indexes[name]
            return frozenset({name}).union(*moved)
        family = self._with_uppers(name)
        for member in family:
            del self.by_name[member], self.indexes[member]
        return family

    def _set(self, name: str, *, up: bool) -> None:
        self.by_name[name] = dataclasses.replace(self.by_name[name], up=up)
        if up:  # vlan_device_event(NETDEV_UP) sets the VLAN devices on it up, too
            for upper in self._uppers(name):
                self._set(upper, up=True)

    def _uppers(self, name: str) -> list[str]:
        return [link.name for link in self.by_name.values() if link.parent == name]

    def _with_uppers(self, name: str) -> frozenset[str]:
        return frozenset({name}).union(*(self._with_uppers(upper) for upper in self._uppers(name)))


@dataclass
class Rules:
    """Our ip rules in the kernel's order: by priority, then by age. A goto need not lead anywhere."""

    ordered: list[FibRule] = field(default_factory=list)

    def copy(self) -> Rules:
        return Rules(list(self.ordered))

    def add(self, rule: FibRule) -> None:
        if rule.action is RuleAction.GOTO and rule.target <= rule.priority:
            raise refuse("add rule", errno.EINVAL)
        if any(_is_same(present, rule) for present in self.ordered):
            raise refuse("add rule", errno.EEXIST)
        place = [i for i, present in enumerate(self.ordered) if present.priority > rule.priority]
        self.ordered.insert(place[0] if place else len(self.ordered), rule)

    def delete(self, rule: FibRule) -> None:
        for present in self.ordered:
            if _is_meant(present, rule):
                self.ordered.remove(present)
                return
        raise refuse("delete rule", errno.ENOENT)


def _has_selectors(present: FibRule, asked: FibRule) -> bool:
    """`fib4_rule_compare`, `fib6_rule_compare`: only the selectors that are asked for are compared."""
    return (
        present.family is asked.family
        and present.priority == asked.priority
        and present.action is asked.action
        and _table(present) == _table(asked)
        and asked.source in (None, present.source)
        and asked.destination in (None, present.destination)
        and asked.device in ("", present.device)
    )


def _is_same(present: FibRule, new: FibRule) -> bool:
    """`rule_exists`: the target of a goto is not compared."""
    return _has_selectors(present, new) and (present.fwmark, present.fwmask) == (new.fwmark, new.fwmask)


def _is_meant(present: FibRule, asked: FibRule) -> bool:
    """`rule_find`, for a deletion: a zero mark or mask is not compared either."""
    return (
        _has_selectors(present, asked)
        and asked.fwmark in (0, present.fwmark)
        and asked.fwmask in (0, present.fwmask)
    )


def _table(rule: FibRule) -> int:
    return rule.target if rule.action is RuleAction.LOOKUP else 0


@dataclass
class Routes:
    """Our routes. A gateway is always on-link, so the kernel never resolves one and never refuses one for that."""

    by_key: dict[tuple[object, ...], Route] = field(default_factory=dict)

    def copy(self) -> Routes:
        return Routes(dict(self.by_key))

    def add(self, route: Route, links: Links, *, replace: bool) -> None:
        if route.device and not links.require(route.device).up:
            raise refuse("add route", errno.ENETDOWN)
        if route.family is Family.IPV6 and len({hop.gateway for hop in route.hops}) < len(route.hops):
            raise refuse("add route", errno.EEXIST)
        if not replace and _key(route) in self.by_key:
            raise refuse("add route", errno.EEXIST)
        self.by_key[_key(route)] = route

    def delete(self, route: Route) -> None:
        if self.by_key.get(_key(route)) != route:
            raise refuse("delete route", errno.ESRCH)
        del self.by_key[_key(route)]

    def drop_devices(self, names: Iterable[str]) -> None:
        """The kernel takes routes away with a device that goes or goes down."""
        gone = frozenset(names)
        self.by_key = {key: route for key, route in self.by_key.items() if route.device not in gone}


def _key(route: Route) -> tuple[object, ...]:
    return route.table, route.destination, route.metric


class FakeRtnl:
    """`kernel.rtnl.Rtnl`, as far as the executor uses it."""

    def __init__(self, links: Links, rules: Rules, routes: Routes) -> None:
        self._links, self._rules, self._routes = links, rules, routes

    def __exit__(self, *_: object) -> None:
        pass

    def change(self, changes: Sequence[FibChange]) -> None:
        """In order; a refusal does not stop those after it, a missing device stops all."""
        for change in changes:
            if isinstance(change.item, Route) and change.item.device:
                self._links.require(change.item.device)
        refusals = [error for change in changes if (error := self._refusal(change))]
        if refusals:
            raise refusals[0]

    def _refusal(self, change: FibChange) -> KernelError | None:
        item, is_delete = change.item, change.verb is Verb.DELETE
        try:
            if isinstance(item, FibRule):
                (self._rules.delete if is_delete else self._rules.add)(item)
            elif is_delete:
                self._routes.delete(item)
            else:
                self._routes.add(item, self._links, replace=change.verb is Verb.REPLACE)
        except KernelError as error:
            return error
        return None
