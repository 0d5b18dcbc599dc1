# SPDX-License-Identifier: Apache-2.0
"""A network namespace in memory that refuses what the kernel refuses, behind the interface that the engine uses.

`FakeKernel` takes the same steps and answers with the same observations as `kernel.executor` and
`kernel.observer`, thousands of times a second: for tests that are exhaustive. It is no second truth:
tests/faults/test_fake_kernel.py carries out the same steps in a real namespace and compares after each of them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from datapath import controller, undertaking
from datapath.facts import Facts, LinkFacts
from datapath.kernel import conntrack, conntrack_zones, executor, sysctl
from datapath.kernel.ids import LiveIds, parse_ids
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family, VlanLink, VrfLink
from datapath.plan.tc import Hook
from datapath.reconcile.actual import Actual, ActualLink, ForeignRule
from datapath.reconcile.present import carried_program
from datapath.service import healer
from datapath.state import State
from tests.fake_kernel.ingress import Ingress
from tests.fake_kernel.nft import Nft
from tests.fake_kernel.refusal import refuse
from tests.fake_kernel.rtnl import FakeRtnl, Links, Routes, Rules

#: What every device has and we may change; a new device starts with the values of `default`.
PER_DEVICE = ("rp_filter", "arp_ignore", "arp_announce", "accept_local")


class FakeKernel:
    """One network namespace.

    Args:
        links: devices at the start; `lo` is one.
        sysctls: values below /proc/sys by key.
        foreign_rules: ip rules of others, for conflicts.
        hook: how it takes eBPF programs.
    """

    def __init__(
        self,
        links: Iterable[ActualLink],
        sysctls: Mapping[str, str],
        foreign_rules: tuple[ForeignRule, ...] = (),
        hook: Hook = Hook.TCX,
    ) -> None:
        self.links, self.rules, self.routes = Links(), Rules(), Routes()
        self.nft, self.ingress = Nft(self.links.by_name), Ingress(hook)
        self.sysctls = dict(sysctls)
        self.foreign_rules = foreign_rules
        self._had_vrf = False
        for link in links:
            self.links.put(link)

    def copy(self) -> FakeKernel:
        made = FakeKernel((), self.sysctls, self.foreign_rules)
        made.links, made.rules, made.routes = self.links.copy(), self.rules.copy(), self.routes.copy()
        made.nft.table = self.nft.table and self.nft.table.copy()
        made.ingress = self.ingress.copy()
        made.nft.devices = made.links.by_name
        made._had_vrf = self._had_vrf
        return made

    def add_link(self, link: VlanLink | VrfLink) -> None:
        known = set(self.links.by_name)
        try:
            if isinstance(link, VrfLink):
                self.links.add_vrf(link)
                self._add_l3mdev_rules()
            else:
                self.links.add_vlan(link)
        finally:
            self._inherit_sysctls(set(self.links.by_name) - known)

    def _add_l3mdev_rules(self) -> None:
        """`vrf_add_fib_rules`: with the first VRF of a namespace, once."""
        if not self._had_vrf:
            self.foreign_rules += tuple(
                ForeignRule(family, 1000, 0, 0, 0, 2, f"ip -{family} rule 1000: l3mdev", is_l3mdev=True)
                for family in Family
            )
        self._had_vrf = True

    def set_sysctl(self, key: str, value: str) -> None:
        if key not in self.sysctls:
            raise refuse(f"set {key}", errno.ENOENT)
        self.sysctls[key] = value

    def device_made(self, link: ActualLink) -> None:
        """Somebody makes a device."""
        self.links.put(link)
        self._inherit_sysctls([link.name])

    def device_deleted(self, name: str) -> None:
        """A device goes, and with it all that hangs on it."""
        lost = self.links.delete(name)
        self.routes.drop_devices(lost)
        gone = lost - set(self.links.by_name)
        self.ingress.drop_devices(gone)
        for device in gone:
            self.nft.drop_device(device)
        keys = {key for key in self.sysctls if key.split("/")[3:4] and key.split("/")[3] in gone}
        self.sysctls = {key: value for key, value in self.sysctls.items() if key not in keys}

    def device_moved(self, name: str, vrf: str) -> None:
        """Into a VRF, or out of any: its routes go, its filter stays."""
        self.routes.drop_devices(self.links.move(name, vrf))

    def device_down(self, name: str) -> None:
        """Somebody sets a device down: its routes go, its filter stays."""
        self.routes.drop_devices(self.links.set_down(name))

    def _inherit_sysctls(self, names: Iterable[str]) -> None:
        for name in names:
            for key in PER_DEVICE:
                self.sysctls[f"net/ipv4/conf/{name}/{key}"] = self.sysctls[f"net/ipv4/conf/default/{key}"]

    def observe(self, desired: Plan, state: State, sight: object = None) -> Actual:
        """As `kernel.observer.observe`."""
        del sight
        found = self.nft.observe()
        asked = {setting.key for setting in desired.sysctls} | set(state.record.sysctls)
        return Actual(
            table=found[0] if found else None,
            fwmark_mask=(parse_ids(found[1]).fwmark_mask or state.fwmark_mask) if found else 0,
            rules=frozenset(self.rules.ordered),
            routes=frozenset(self.routes.by_key.values()),
            foreign_rules=self.foreign_rules,
            links=dict(self.links.by_name),
            sysctls={
                key: value for key, value in self.sysctls.items() if key in asked or _is_always_read(key)
            },
            ingress=self.ingress.observe(carried_program(desired, self.links.by_name), self.links.indexes),
        )

    def facts(self, state: State, sight: object = None, policies: object = ()) -> Facts:
        """As `kernel.observer.observe_facts`."""
        del sight, policies  # addresses and default routes are not modelled
        found = self.nft.observe()
        live = parse_ids(found[1]) if found else LiveIds()
        ids = {item.name: item for item in state.ids} | {item.name: item for item in live.ids}
        links = [self.links.by_name[name] for name in sorted(self.links.by_name)]
        return Facts(
            links=tuple(
                LinkFacts(
                    name=link.name,
                    kind=link.kind,
                    parent=link.parent,
                    vlan_id=link.vlan_id,
                    vlan_protocol=link.vlan_protocol,
                    up=link.up,
                    vrf=link.vrf,
                    vrf_table=link.vrf_table,
                )
                for link in links
            ),
            ids=tuple(ids[name] for name in sorted(ids)),
            fwmark_mask=live.fwmark_mask or state.fwmark_mask,
            previous_ids=state.ids or live.ids,
            previous_mask=state.fwmark_mask or live.fwmark_mask,
            rule_bank=live.rule_bank,
            has_rule_tree=live.has_rule_tree,
            gateways_down=dict(state.gateways_down),
            egress_sets=dict(state.egress_sets),
        )

    def snapshot(self) -> dict[str, Any]:
        """Everything, comparable; without what a rollback may change unseen (numbers of programs, ages of rules)."""
        names = {index: name for name, index in self.links.indexes.items()}
        return {
            "links": dict(self.links.by_name),
            "rules": frozenset(self.rules.ordered),
            "routes": frozenset(self.routes.by_key.values()),
            "sysctls": dict(self.sysctls),
            "table": self.nft.table and self.nft.table.copy(),
            "attached": {
                name: self.ingress.programs[number].with_names(names)
                for name, number in self.ingress.attached.items()
            },
            "programs": len(self.ingress.programs),
            "clsact": frozenset(self.ingress.clsact),
        }

    def serve(self, patch: pytest.MonkeyPatch) -> None:
        """Let the engine's own executor and controller work on this kernel, from now on."""
        for module in (controller, undertaking, healer):
            patch.setattr(module, "observe", self.observe)
        patch.setattr(controller, "observe_facts", self.facts)
        rtnl = FakeRtnl(self.links, self.rules, self.routes)
        patch.setattr(rtnl, "add_link", self.add_link, raising=False)
        patch.setattr(
            rtnl, "enslave", lambda slave: self.device_moved(slave.device, slave.vrf), raising=False
        )
        patch.setattr(rtnl, "release", lambda device: self.device_moved(device, ""), raising=False)
        patch.setattr(rtnl, "delete_link", self.device_deleted, raising=False)
        patch.setattr(rtnl, "set_up", self.links.set_up, raising=False)
        for name, value in {
            "Rtnl": lambda: rtnl,
            "sysctl": SimpleNamespace(write=self.set_sysctl),
            "transaction": SimpleNamespace(check=self.nft.check, apply=self.nft.apply),
            "ingress": SimpleNamespace(
                verify=lambda program: self.ingress.verify(program, self.links.indexes),
                sync=lambda program, clsact, **_: self.ingress.sync(program, clsact, self.links.indexes),
            ),
        }.items():
            patch.setattr(executor, name, value)
        # A program in memory needs nobody who holds it.
        for name in ("HeldProgram", "HeldSteering"):
            patch.setattr(healer, name, _Nobody)
        # There are no connections here.
        patch.setattr(conntrack, "forget", lambda *_: None)
        patch.setattr(conntrack, "translate", lambda _: 0)
        patch.setattr(conntrack_zones, "move", lambda _: 0)


class _Nobody:
    """Who holds programs for a daemon."""

    def attach(self, desired: object, filtered: frozenset[str] = frozenset()) -> None:
        pass

    def follow(self, desired: object) -> None:
        pass


def _is_always_read(key: str) -> bool:
    """As `kernel.sysctl.observe` chooses them."""
    *folder, device, name = key.split("/")
    if folder != ["net", "ipv4", "conf"]:
        return False
    return name in sysctl._PER_DEVICE or (device == "default" and name in sysctl._INHERITED)
