# SPDX-License-Identifier: Apache-2.0
"""Devices: VLANs and VRFs come and go, and devices move into and out of VRFs.

A move sets the device down and up, and the kernel drops all routes by it, and by VLAN devices on it. So moves come
before routes, and whoever compares routes afterwards takes those of moved devices for gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from datapath.plan.ingress import VlanProtocol
from datapath.plan.model import Plan
from datapath.plan.rtnl import Route, Slave, VlanLink, VrfLink
from datapath.reconcile.actual import Actual, ActualLink, Record
from datapath.reconcile.present import is_in
from datapath.reconcile.steps import AddLink, DeleteLink, Enslave, Release, SetLinkUp, Step


@dataclass(frozen=True, slots=True)
class LinkChanges:
    """Steps by phase.

    Attributes:
        add: before everything that needs a device.
        moves: after `add` and the sysctls of new devices, before rules and routes.
        remove: after everything else.
        created: devices that `add` makes.
        moved: devices whose routes are lost by `moves`.
        slaves: devices that we put into a VRF, once `add` and `moves` are done.
    """

    add: tuple[Step, ...]
    moves: tuple[Step, ...]
    remove: tuple[Release | DeleteLink, ...]
    created: frozenset[str]
    moved: frozenset[str]
    slaves: frozenset[Slave]

    def surviving(self, routes: Iterable[Route]) -> frozenset[Route]:
        """Those that the moves leave."""
        return frozenset(route for route in routes if route.device not in self.moved)

    @property
    def deleted(self) -> frozenset[str]:
        """Devices that `remove` deletes."""
        return frozenset(step.link.name for step in self.remove if isinstance(step, DeleteLink))

    @property
    def kept_slaves(self) -> frozenset[Slave]:
        """What is left of `slaves` once `remove` is done."""
        released = {step.slave for step in self.remove if isinstance(step, Release)}
        return frozenset(slave for slave in self.slaves - released if slave.device not in self.deleted)


def diff_links(actual: Actual, desired: Plan, record: Record, ready: frozenset[str]) -> LinkChanges:
    """Changes from the present devices to the desired ones; those that are not `ready` wait."""
    add: list[Step] = []
    created: set[str] = set()
    links: list[VlanLink | VrfLink] = [vrf for vrf in desired.vrfs if vrf.is_made]
    for link in (*links, *desired.links):
        present = actual.links.get(link.name)
        if link.name not in ready:
            continue
        if present is None:
            add.append(AddLink(link))
            created.add(link.name)
        elif not present.up:
            add.append(SetLinkUp(link.name))
    moves = tuple(_moves(actual, desired, record, ready))
    # Somebody may have taken it elsewhere: that is theirs to keep.
    present_slaves = {slave for slave in record.slaves if is_in(slave, actual.links)}
    moving = {step.slave.device for step in moves}
    slaves = {slave for slave in present_slaves if slave.device not in moving}
    slaves |= {step.slave for step in moves if isinstance(step, Enslave)}
    gone = _surplus(actual, desired, record)
    staying = {slave.device for slave in desired.slaves} | {step.link.name for step in gone}
    releases = [Release(slave) for slave in sorted(slaves) if slave.device not in staying]
    remove: tuple[Release | DeleteLink, ...] = (*releases, *_inner_first(gone))
    moved = _with_uppers(moving, actual.links)
    return LinkChanges(tuple(add), moves, remove, frozenset(created), moved, frozenset(slaves))


def _moves(
    actual: Actual, desired: Plan, record: Record, ready: frozenset[str]
) -> Iterator[Enslave | Release]:
    """Into VRFs, and out of those that devices which stay in use no longer belong to."""
    wanted = {slave.device: slave for slave in desired.slaves}
    used = {route.device for route in desired.routes} | {n.device for n in desired.ingress.networks}
    for mine in sorted(record.slaves):
        if is_in(mine, actual.links) and mine.device in used and mine.device not in wanted:
            yield Release(mine)
    for device, slave in sorted(wanted.items()):
        present = actual.links.get(device)
        if device in ready and (present is None or present.vrf != slave.vrf):
            yield Enslave(slave)


def _surplus(actual: Actual, desired: Plan, record: Record) -> list[DeleteLink]:
    """Devices that we made and nobody needs. A VRF that others have put devices into stays."""
    wanted = {link.name for link in desired.links} | {vrf.name for vrf in desired.vrfs}
    gone: list[DeleteLink] = []
    for name in sorted(record.links - wanted):
        present = actual.links.get(name)
        # Somebody may have deleted ours and made another device of that name: that one is theirs.
        if present is not None and present.kind == "vlan":
            vlan = VlanLink(name, present.parent, present.vlan_id, VlanProtocol(present.vlan_protocol))
            gone.append(DeleteLink(vlan))
    deleted = {step.link.name for step in gone}
    for name in sorted(record.links - wanted):
        present = actual.links.get(name)
        leaving = deleted | {slave.device for slave in record.slaves if slave.vrf == name}
        others = [
            link.name for link in actual.links.values() if link.vrf == name and link.name not in leaving
        ]
        if present is not None and present.kind == "vrf" and not others:
            gone.append(DeleteLink(VrfLink(name, present.vrf_table, is_made=True)))
    return gone


def _inner_first(steps: list[DeleteLink]) -> tuple[DeleteLink, ...]:
    """A device before its trunk: with the trunk the kernel takes all devices on it, and the next step would fail."""
    parents = {step.link.name: getattr(step.link, "parent", "") for step in steps}

    def depth(name: str) -> int:
        steps = 0
        while (name := parents.get(name, "")) in parents and steps < len(parents):
            steps += 1
        return steps

    return tuple(
        sorted(
            steps,
            key=lambda step: (isinstance(step.link, VrfLink), -depth(step.link.name), step.link.name),
        )
    )


def _with_uppers(devices: Iterable[str], links: Mapping[str, ActualLink]) -> frozenset[str]:
    """The devices, and all that lie on them."""
    found = set(devices)
    for _ in range(len(links)):
        more = {link.name for link in links.values() if link.parent in found} - found
        if not more:
            break
        found |= more
    return frozenset(found)
