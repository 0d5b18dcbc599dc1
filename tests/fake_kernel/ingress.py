# SPDX-License-Identifier: Apache-2.0
"""eBPF programs, their maps and where they are attached: what `kernel.ingress` makes of the kernel.

Act by act, with the same points between the acts, because a refusal in the middle leaves the first half done.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from datapath.errors import ConflictError, EbpfError, KernelError
from datapath.kernel.bpf import Capacities, IngressTables, resolve
from datapath.plan.ingress import IngressProgram
from datapath.plan.tc import Hook
from datapath.points import reached
from datapath.reconcile.actual import ActualIngress
from tests.fake_kernel.refusal import refuse

_Maps = dict[str, dict[Any, Any]]


@dataclass
class Program:
    """A loaded program. Attached nowhere, it is gone."""

    fwmark_mask: int
    room: Capacities
    maps: _Maps = field(default_factory=dict)

    def copy(self) -> Program:
        return Program(self.fwmark_mask, self.room, dict(self.maps))

    def with_names(self, names: Mapping[int, str]) -> _Maps:
        """Contents that compare although a device was made again."""
        networks = {
            (names[key.ifindex], key.vlan_protocol, key.vlan_id): (
                names[entry.device_ifindex],
                replace(entry, device_ifindex=0),
            )
            for key, entry in self.maps["networks"].items()
        }
        return {**self.maps, "networks": networks, "mask": {"mask": self.fwmark_mask}}

    def write(self, desired: _Maps) -> None:
        """As `LoadedIngress.write_tables`: prefixes, networks; then away with networks, prefixes."""
        if self.maps == desired:
            return
        names = sorted(desired, key=lambda name: (name == "networks", name))
        for name in names:
            reached("add entries to a map of the eBPF program")
            self.maps[name] = self.maps.get(name, {}) | desired[name]
        for name in reversed(names):
            reached("remove entries from a map of the eBPF program")
            self.maps[name] = dict(desired[name])

    def why_not(self, mask: int, tables: IngressTables) -> str:
        """Why it cannot serve in place; empty where it can."""
        if self.fwmark_mask != mask:
            return "the fwmark mask changes"
        together = len(self.maps["networks"].keys() | tables.networks.keys())
        too_small = not self.room.holds(tables.need) or together > self.room.networks
        return "its maps are too small" if too_small else ""


def _maps(tables: IngressTables) -> _Maps:
    maps: _Maps = {"networks": dict(tables.networks)}
    for table, prefixes in tables.prefixes.items():
        for version in (4, 6):
            maps[f"{table}{version}"] = {k: v for k, v in prefixes.items() if k[1].version == version}
    return maps


class Ingress:
    """The ingress hooks of all devices.

    Attributes:
        hook: how this kernel takes programs.
        attached: number of the program, by device.
        foreign: devices where somebody else sits in our place; with tcx there is room for everybody.
    """

    def __init__(self, hook: Hook) -> None:
        self.hook = hook
        self.attached: dict[str, int] = {}
        self.programs: dict[int, Program] = {}
        self.clsact: set[str] = set()
        self.foreign: set[str] = set()
        self._last_number = 0

    def copy(self) -> Ingress:
        made = Ingress(self.hook)
        made.attached, made.clsact, made.foreign = dict(self.attached), set(self.clsact), set(self.foreign)
        made.programs = {number: program.copy() for number, program in self.programs.items()}
        made._last_number = self._last_number
        return made

    def observe(self, desired: IngressProgram, indexes: Mapping[str, int]) -> ActualIngress:
        wanted = desired.attachments
        differences: tuple[str, ...] = ()
        try:
            why = self._why_reload(desired, resolve(desired, indexes)) if wanted else ""
        except KernelError as error:
            differences = (str(error),)
        else:
            differs = self._differs(desired, indexes) if wanted and not why else ""
            detach = ", ".join(sorted(set(self.attached) - set(wanted)))
            differences = tuple(text for text in (why, differs, detach) if text)
        attached, clsact = frozenset(self.attached), frozenset(self.clsact)
        return ActualIngress(attached, differences, clsact, frozenset(self.foreign), self.hook)

    def _differs(self, desired: IngressProgram, indexes: Mapping[str, int]) -> str:
        missing = [name for name in desired.attachments if name not in self.attached]
        present = next(iter(self._serving(desired).values()))
        if missing or present.maps != _maps(resolve(desired, indexes)):
            return f"the maps differ, or not attached to {missing}"
        return ""

    def _serving(self, desired: IngressProgram) -> dict[int, Program]:
        numbers = {self.attached[name] for name in desired.attachments if name in self.attached}
        return {number: self.programs[number] for number in sorted(numbers)}

    def _why_reload(self, desired: IngressProgram, tables: IngressTables) -> str:
        serving = list(self._serving(desired).values())
        if len(serving) != 1:
            return "several programs are attached" if serving else "nothing is attached yet"
        return serving[0].why_not(desired.fwmark_mask, tables)

    def verify(self, desired: IngressProgram, indexes: Mapping[str, int]) -> None:
        """The preflight loads a program aside; what is refused then is the host's inability."""
        try:
            needs_load = bool(self._why_reload(desired, resolve(desired, indexes)))
        except KernelError:
            needs_load = True
        if not needs_load:
            return
        try:
            reached("add entries to a map of the eBPF program")
        except KernelError as error:
            raise EbpfError(error.operation, error.reason, errno=error.errno) from error

    def sync(self, desired: IngressProgram, clsact: frozenset[str], indexes: Mapping[str, int]) -> None:
        wanted = desired.attachments
        if wanted:
            self._serve(desired, resolve(desired, indexes), indexes)
        for name in sorted(set(self.attached) - set(wanted)):
            reached(f"detach the program from {name}")
            del self.attached[name]
        for name in sorted(clsact - set(wanted if self.hook is Hook.CLSACT else ())):
            if name in self.clsact and name not in self.foreign:
                reached(f"delete clsact from {name}")
                self.clsact.remove(name)
        self._collect()

    def _serve(self, desired: IngressProgram, tables: IngressTables, indexes: Mapping[str, int]) -> None:
        try:
            if self._why_reload(desired, tables):
                made = Program(desired.fwmark_mask, tables.need)
                made.write(_maps(tables))
                self._last_number += 1
                number, missing = self._last_number, list(desired.attachments)
                self.programs[number] = made
            else:
                ((number, kept),) = self._serving(desired).items()
                kept.write(_maps(tables))
                missing = [name for name in desired.attachments if name not in self.attached]
            for name in missing:
                self._attach(name, number, indexes)
        finally:
            self._collect()

    def _attach(self, name: str, number: int, indexes: Mapping[str, int]) -> None:
        if name not in indexes:
            raise refuse(f"attach the eBPF program to {name}", errno.ENODEV)
        if self.hook is Hook.CLSACT:
            if name in self.foreign:
                raise ConflictError(f"{name}: our place at tc ingress is taken")
            if name not in self.clsact:
                reached("add clsact")
                self.clsact.add(name)
        reached(f"attach the program to {name}")
        self.attached[name] = number

    def _collect(self) -> None:
        self.programs = {number: self.programs[number] for number in set(self.attached.values())}

    def drop_devices(self, names: Iterable[str]) -> None:
        """A device takes its qdisc and its filters along."""
        gone = set(names)
        self.attached = {name: number for name, number in self.attached.items() if name not in gone}
        self.clsact -= gone
        self.foreign -= gone
        self._collect()
