# SPDX-License-Identifier: Apache-2.0
"""Read the namespace: facts for the compiler, the actual state for reconciliation. Changes nothing."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

from datapath.facts import Facts, LinkFacts
from datapath.kernel import ingress, nft, steering, sysctl, tc
from datapath.kernel.bpf.glance import Glance, glance
from datapath.kernel.default_routes import default_devices
from datapath.kernel.flowtables import foreign_flowtables, why_no_flowtables
from datapath.kernel.ids import LiveIds, live_ids
from datapath.kernel.marks_in_use import observe_marks
from datapath.kernel.rtnl import ROUTES, RULES, Devices, Rtnl
from datapath.kernel.vrf import stranded
from datapath.kernel.zones_in_use import has_stale_early_demux, observe_zones
from datapath.plan.ingress import IngressProgram
from datapath.plan.model import Plan
from datapath.plan.nft import CLASSIFY_CHAIN, TABLE_FAMILY, TABLE_NAME
from datapath.plan.rtnl import FibRule, Route
from datapath.plan.steering import SteeringProgram
from datapath.plan.tc import Direction
from datapath.reconcile.actual import (
    Actual,
    ActualIngress,
    ActualLink,
    ActualSteering,
    ActualTable,
    ForeignMark,
    ForeignRule,
)
from datapath.reconcile.conflicts import new_tables, tables_in_force
from datapath.reconcile.present import carried_program, carried_steering
from datapath.reconcile.steps import (
    AddRoute,
    DeleteRoute,
    ForgetConnections,
    MoveConnections,
    SetSysctl,
    Step,
    TranslateConnections,
    kind_of,
)
from datapath.state import State

_FoundTable = tuple[ActualTable, list[str]] | None
_Rules = tuple[frozenset[FibRule], tuple[ForeignRule, ...]]
_Part = TypeVar("_Part")

_OF_CONNECTIONS: Final = (ForgetConnections, TranslateConnections, MoveConnections)
_ALWAYS_HEARD: Final = frozenset({"table", "routes"})

#: So few tables are read by themselves, where so many routes need not be read then.
_TABLES_MAX: Final = 4
_ROUTES_MANY: Final = 1000

#: What an event about a kind of object makes worth reading again. A device takes its routes, filters and sysctls along.
_TOLD_BY: Final[Mapping[str, frozenset[str]]] = {
    "nft": frozenset({"table"}),
    "rule": frozenset({"rules"}),
    "route": frozenset({"routes", "defaults"}),
    "link": frozenset({"links", "facts", "routes", "sysctls", "settings", "ingress", "steering", "defaults"}),
    "address": frozenset({"facts", "routes"}),
    "tc": frozenset({"ingress", "steering"}),
    "flowtable": frozenset({"flowtables"}),
    "sysctl": frozenset({"sysctls", "settings"}),
}
#: A device that goes leaves its flowtables without a word, and an event about one does not say whose it is.
_CHANGES_FLOWTABLES: Final = frozenset({"link", "flowtable"})


class Sight:
    """What was read of the kernel. Lives as long as one look, or, in a daemon that hears of changes, longer.

    Args:
        glances: for who wants to be told of changes of programs that no event tells of.
    """

    def __init__(self, *, glances: bool = False) -> None:
        self._parts: dict[str, Any] = {}
        self._takes_glances = glances
        self._glances: dict[Direction, Glance] = {}

    def forget(self, kinds: Iterable[str]) -> None:
        """Read again what an event of these kinds is about; everything for a kind that is not known."""
        kinds = set(kinds)
        if (
            kinds & _CHANGES_FLOWTABLES
            and (table := self._parts.get("table", (None, None))[1])
            and table[0].flowtables
        ):
            kinds.add("nft")
        for kind in kinds:
            if kind not in _TOLD_BY:
                self._parts.clear()
            for part in _TOLD_BY.get(kind, ()):
                self._parts.pop(part, None)

    def keep_heard(self) -> None:
        """Forget what changes without a word to who listens as a daemon does (`kernel/watch.py`).

        Every change of our table and of our routes is heard; of devices, rules and sysctls only what concerns the
        policy in force, and another policy may ask for more.
        """
        self._parts = {part: read for part, read in self._parts.items() if part in _ALWAYS_HEARD}

    def share(self, plan: Plan) -> None:
        """Keep what is as desired once: thousands of routes and rules, which the plan has as well."""
        self._parts["routes"] = (None, ROUTES.shared(self.routes(), plan.route_set))
        ours, foreign = self.rules()
        self._parts["rules"] = (None, (RULES.shared(ours, plan.rule_set), foreign))

    def touched(self, steps: Iterable[Step]) -> None:
        """Read again what these steps were about, and nothing else."""
        steps = tuple(steps)
        keys = frozenset(step.key for step in steps if isinstance(step, SetSysctl))
        tables = frozenset(step.route.table for step in steps if isinstance(step, AddRoute | DeleteRoute))
        # What becomes of connections is not looked at; a step of a kind that nobody has told makes everything doubtful.
        kinds = {kind_of(step) for step in steps if not isinstance(step, _OF_CONNECTIONS)} - {"sysctl"}
        _, known = self._parts.get("routes", (None, frozenset()))
        if len(known) >= _ROUTES_MANY and len(tables) <= _TABLES_MAX and "link" not in kinds:
            kinds.discard("route")
            stale = frozenset(route for route in known if route.table in tables)
            read = _ask(lambda rtnl: rtnl.routes(self._devices(), sorted(tables))) if tables else frozenset()
            self._parts["routes"] = (None, (known - stale) | read)
        self.forget(kinds)
        if "sysctls" in self._parts and keys:
            asked, values = self._parts["sysctls"]
            self._parts["sysctls"] = (asked, values | sysctl.read_all(keys))

    def filter_left(self, ifname: str) -> None:
        """The daemon gave a device tcx instead of its filter: the rest of what was read is as it was."""
        if "ingress" in self._parts:
            question, actual = self._parts["ingress"]
            filtered = actual.filtered - {ifname}
            self._parts["ingress"] = (question, dataclasses.replace(actual, filtered=filtered))
        if seen := self._glances.get(Direction.INGRESS):
            self._glances[Direction.INGRESS] = seen.moved(ifname)

    def table(self) -> _FoundTable:
        return self._read("table", lambda: nft.list_table(TABLE_FAMILY, TABLE_NAME))

    def live_ids(self) -> LiveIds:
        """What our table says; nothing where it is not there."""
        found = self.table()
        return live_ids(found[1]) if found else LiveIds()

    def links(self) -> dict[str, ActualLink]:
        return self._devices().links

    def link_facts(self) -> tuple[LinkFacts, ...]:
        return self._read("facts", lambda: _ask(lambda rtnl: rtnl.link_facts(self._devices())))

    def _devices(self) -> Devices:
        return self._read("links", self._dump_devices)

    def _dump_devices(self) -> Devices:
        devices = _ask(Rtnl.devices)
        self._parts["settings"] = (None, devices.settings)
        return devices._replace(settings={})

    def _settings(self) -> Mapping[str, Mapping[str, str]]:
        """Of a dump that was made for this look, and is used once: whoever writes a sysctl says so to few only."""
        if "settings" not in self._parts:
            self._dump_devices()
        settings: Mapping[str, Mapping[str, str]] = self._parts.pop("settings")[1]
        return settings

    def rules(self) -> _Rules:
        return self._read("rules", lambda: _ask(Rtnl.rules))

    def routes(self) -> frozenset[Route]:
        return self._read("routes", lambda: _ask(lambda rtnl: rtnl.all_routes(self._devices())))

    def sysctls(self, keys: frozenset[str]) -> dict[str, str]:
        """Those that are always looked at, and these; more of them, where they were read before."""
        asked: frozenset[str] | None
        values: dict[str, str]
        asked, values = self._parts.get("sysctls", (None, {}))
        if asked is None:
            asked, values = keys, sysctl.observe(keys, self._settings())
        elif not keys <= asked:
            values = values | sysctl.read_all(keys - asked)
        self._parts["sysctls"] = (asked | keys, values)
        return values

    def ingress(
        self, desired: IngressProgram, qdiscs: Callable[[], frozenset[int]] = tc.clsact_devices
    ) -> ActualIngress:
        def read() -> ActualIngress:
            return ingress.observe(desired, self._glance(desired.attachments, Direction.INGRESS), qdiscs)

        return self._read_for("ingress", desired, read)

    def steering(
        self, desired: SteeringProgram, qdiscs: Callable[[], frozenset[int]] = tc.clsact_devices
    ) -> ActualSteering:
        def read() -> ActualSteering:
            return steering.observe(desired, self._glance(desired.attachments, Direction.EGRESS), qdiscs)

        return self._read_for("steering", desired, read)

    def _glance(self, ifnames: Sequence[str], direction: Direction) -> dict[str, int]:
        """Before the programs there are read: a change meanwhile is one since the glance. Returns all ifindexes."""
        indexes = self._devices().indexes
        if self._takes_glances:
            self._glances[direction] = glance(
                [indexes[name] for name in ifnames if name in indexes], direction
            )
        return indexes

    def is_as_glanced(self) -> bool:
        """Whether nobody has attached or detached a program since they were read last; a change is told once.

        Raises:
            KernelError: the kernel cannot be asked.
        """
        if all(seen.holds() for seen in self._glances.values()):
            return True
        self._glances.clear()
        return False

    def default_devices(self) -> dict[int, tuple[str, ...]]:
        return self._read("defaults", default_devices)

    def flowtables(self) -> tuple[str, ...]:
        return self._read("flowtables", foreign_flowtables)

    def why_no_flowtables(self) -> str:
        """Empty where the kernel takes them; nobody tells when it learns to."""
        found = self.table()
        return "" if found and found[0].flowtables else self._read("accelerate", why_no_flowtables)

    def _read(self, part: str, read: Callable[[], _Part]) -> _Part:
        return self._read_for(part, None, read)

    def _read_for(self, part: str, question: object, read: Callable[[], _Part]) -> _Part:
        known = self._parts.get(part)
        answer: _Part = known[1] if known is not None and known[0] == question else read()
        # Of two equal questions the newer lives on, in a plan.
        self._parts[part] = (question, answer)
        return answer


def _ask(question: Callable[[Rtnl], _Part]) -> _Part:
    with Rtnl() as rtnl:
        return question(rtnl)


def observe_facts(state: State, sight: Sight | None = None, *, policies: tuple[str, ...] = ()) -> Facts:
    """What the compiler may know of this host. Ids come from the kernel, else from the state.

    Args:
        state: ids as they were remembered, and the policy in force.
        sight: what was read already.
        policies: texts of the policies that are to be compiled; default: the one in force.
    """
    texts = policies or (state.policy,)
    sight = sight or Sight()
    found = sight.table()
    live = sight.live_ids()
    ids = {item.name: item for item in state.ids} | {item.name: item for item in live.ids}
    return Facts(
        links=sight.link_facts(),
        ids=tuple(ids[name] for name in sorted(ids)),
        fwmark_mask=live.fwmark_mask or state.fwmark_mask,
        previous_ids=state.ids or live.ids,
        previous_mask=state.fwmark_mask or live.fwmark_mask,
        marked_by_nft=found is not None and CLASSIFY_CHAIN in found[0].chains,
        rule_bank=live.rule_bank,
        has_rule_tree=live.has_rule_tree,
        # A router's full table is not read for nothing; the word may stand elsewhere, which does no harm.
        default_devices=sight.default_devices()
        if any("direct" in text or "accelerate" in text for text in texts)
        else {},
        taken_zones=observe_zones() if any("isolate_clients" in text for text in _new(texts, state)) else {},
        flowtables=sight.flowtables(),
        flowtables_refused=sight.why_no_flowtables() if any("accelerate" in text for text in texts) else "",
        stale_early_demux=has_stale_early_demux(os.uname().release),
        gateways_down=dict(state.gateways_down),
        forwarding=sysctl.forwarding(),
        ipv6=sysctl.has_ipv6(),
        egress_sets=dict(state.egress_sets),
    )


def _new(texts: tuple[str, ...], state: State) -> Iterable[str]:
    """Policies that are not in force yet: these may claim something."""
    return (text for text in texts if text != state.policy)


def tables_of_others(plan: Plan) -> Mapping[int, str]:
    """Tables of a plan in force that are ours alone and hold routes of others, with one example each.

    Two requests a table: for who wants to know, not for every round.
    """
    tables = sorted(tables_in_force(plan))
    return _ask(lambda rtnl: rtnl.foreign_routes(tables)) if tables else {}


def _foreign_marks(desired: Plan, live: LiveIds) -> tuple[ForeignMark, ...]:
    """Listing everybody's rules is dear on a large node: only before a mask is claimed, not in every round."""
    claims = any(ids.fwmark for ids in desired.ids)
    if not claims or live.fwmark_mask == desired.fwmark_mask:
        return ()
    return observe_marks()


def observe_links() -> Facts:
    """What a normal user may see: devices, addresses and forwarding, but no nftables and so no ids."""
    with Rtnl() as rtnl:
        links = rtnl.link_facts()
    return Facts(
        links=links,
        default_devices=default_devices(),
        forwarding=sysctl.forwarding(),
        ipv6=sysctl.has_ipv6(),
    )


def observe(desired: Plan, state: State, sight: Sight | None = None) -> Actual:
    """The actual state, as far as the plan, our own objects and conflicts with it are concerned."""
    sight = sight or Sight()
    found, live, links = sight.table(), sight.live_ids(), sight.links()
    keys = {setting.key for setting in desired.sysctls} | set(state.record.sysctls)
    if desired.slaves:
        keys.add(sysctl.NEW_DEVICES_KEEP_ADDRESSES)
    sight.share(desired)
    rules, foreign_rules = sight.rules()
    qdiscs = functools.cache(tc.clsact_devices)  # once for both programs
    tables = new_tables(Actual(rules=rules), desired)
    return Actual(
        table=found[0] if found else None,
        fwmark_mask=(live.fwmark_mask or state.fwmark_mask) if found else 0,
        rules=rules,
        routes=sight.routes(),
        foreign_rules=foreign_rules,
        foreign_tables=_ask(lambda rtnl: rtnl.foreign_routes(sorted(tables))) if tables else {},
        foreign_marks=_foreign_marks(desired, live),
        links=links,
        sysctls=sight.sysctls(frozenset(keys)),
        ingress=sight.ingress(carried_program(desired, links), qdiscs),
        steering=sight.steering(carried_steering(desired, links), qdiscs),
        stranded=stranded(desired, links),
    )
