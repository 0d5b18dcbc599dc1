# SPDX-License-Identifier: Apache-2.0
"""From actual to desired: an ordered list of steps.

The order is the point. Consumers come before producers, permissive before strict: a mark must find
its rule, a rule its table, and a table its routes, at every moment in between. Removal runs the other
way. So no packet of a flow that both the old and the new policy serve meets a half-made state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from datapath.plan.ingress import IngressProgram
from datapath.plan.model import Backend, MarkChange, Plan
from datapath.plan.nft import CLASSIFY_CHAIN, TABLE_FAMILY, TABLE_NAME, NftTable
from datapath.plan.rtnl import FibRule, Route, RouteType
from datapath.plan.steering import SteeringProgram
from datapath.plan.tc import MANY_DEVICES, Hook
from datapath.reconcile.actual import Actual, Record
from datapath.reconcile.batches import rule_phase
from datapath.reconcile.connections import forgotten
from datapath.reconcile.egress import published, retired_marks, with_retired
from datapath.reconcile.links import LinkChanges, diff_links
from datapath.reconcile.nft import as_actual, diff_table
from datapath.reconcile.present import (
    carried_program,
    carried_steering,
    carried_table,
    needed_devices,
    ready_devices,
)
from datapath.reconcile.steps import (
    AddRoute,
    AddRule,
    DeleteRoute,
    DeleteRule,
    ExtendSteering,
    MoveConnections,
    NftTransaction,
    Step,
    SyncIngress,
    TranslateConnections,
    TrimSteering,
)
from datapath.reconcile.sysctls import SysctlChanges, diff_sysctls, inherited, split_by_device
from datapath.reconcile.unchanged import Unchanged

_Step = TypeVar("_Step")
TABLE_SPEC = f"{TABLE_FAMILY} {TABLE_NAME}"


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """What to do, in order, and what the record must hold before it starts and after it ended.

    Attributes:
        steps: nothing to do where empty.
        before: the record to be written before the first step.
        after: the record once all steps are done.
        waiting: devices that are missing or down; what hangs on them is not among the steps.
    """

    steps: tuple[Step, ...]
    before: Record
    after: Record
    waiting: frozenset[str] = frozenset()


_settled: Final[Unchanged[ChangeSet]] = Unchanged()


def reconcile(
    actual: Actual,
    desired: Plan,
    record: Record,
    *,
    forget: tuple[tuple[int, int], ...] = (),
    unmark: tuple[MarkChange, ...] = (),
) -> ChangeSet:
    """The steps from `actual` to `desired`.

    Args:
        actual: as observed.
        desired: as compiled; an empty plan removes everything of ours.
        record: what only memory can tell.
        forget: pairs of mark and mask whose connections must not survive (networks that are gone).
        unmark: networks whose connections go on without a mark.
    """
    found = _settled.of(actual, desired, record) if not forget and not unmark else None
    if found is None:
        found = _reconcile(actual, desired, record, forget, unmark)
        if found.steps:
            _settled.forget()
        elif not forget and not unmark:
            _settled.keep(actual, desired, record, found)
    return found


def _reconcile(
    actual: Actual,
    desired: Plan,
    record: Record,
    forget: tuple[tuple[int, int], ...],
    unmark: tuple[MarkChange, ...],
) -> ChangeSet:
    ready = ready_devices(desired, actual.links, record.slaves)
    links = diff_links(actual, desired, record, ready)
    # What the kernel drops meanwhile is added as if it had never been there.
    routes = dataclasses.replace(actual, routes=links.surviving(actual.routes)) if links.moves else actual
    values = inherited(actual.sysctls, links.created) | dict(actual.sysctls)
    sysctls = diff_sysctls(values, desired.sysctls, desired.rp_filter_exempt, record)
    early, late = split_by_device(sysctls.loosen, links.created)
    steps: list[Step] = [*early, *links.add, *late]
    vrf_tables = {link.vrf_table for link in actual.links.values()} | {vrf.table for vrf in desired.vrfs}
    leaks, rules = _split(_added_rules(actual, desired), lambda step: bool(step.rule.device))
    ends, added = _split(
        _added_routes(routes, desired, ready), lambda step: _ends_vrf(step.route, vrf_tables)
    )
    # A VRF must lead to pods and services, and nowhere else, before it has a device.
    steps += [*leaks, *ends, *links.moves]
    steering = carried_steering(desired, actual.links)
    if actual.steering.missing:
        steps.append(ExtendSteering(steering))
    # An empty table answers nothing, so the walk goes on as without the rule. The other way round, Linux would walk
    # every route of every IPv6 table for each rule (`fib6_rule_flush_cache`): 5 s instead of 1 for 4,094 networks.
    steps += [*rules, *added]
    retired = retired_marks(actual, desired)
    # What this change makes is there after the first transaction, and an act of ours can be checked only before.
    devices = frozenset(actual.links)
    final = carried_table(desired.table, devices | links.created)
    meanwhile = carried_table(desired.transition, devices) if desired.transition else final
    if meanwhile is final and final is not None and final.flowtables:
        meanwhile = carried_table(final, devices)
    if retired:
        meanwhile = with_retired(meanwhile, retired, actual.fwmark_mask)
    text = diff_table(actual.table, meanwhile, spec=TABLE_SPEC)
    program = carried_program(desired, actual.links)
    filtered = _filtered(actual, program)
    needed = _needed_clsact(actual, program, steering) | filtered | _kept_clsact(desired, record)
    released = record.clsact - needed
    ingress = (
        [SyncIngress(program, released, filtered, actual.ingress.stays)]
        if _ingress_differs(actual, program, released)
        else []
    )
    ahead = published(actual.table, meanwhile) if text else ""
    nft = [NftTransaction(part) for part in (ahead, text) if part]
    steps += [*ingress, *nft] if _ingress_first(actual, desired) else [*nft, *ingress]
    ended, stale = _split(_removed_routes(routes, desired), lambda step: _ends_vrf(step.route, vrf_tables))
    # The other way round, and for the same reason: rules of an empty table are cheap to delete.
    steps += [*stale, *_removed_rules(actual, desired)]
    closed = tuple((mark, actual.fwmark_mask) for mark in retired)
    steps += _end_of_transition(desired, meanwhile, final, closed)
    if actual.steering.surplus:
        steps.append(TrimSteering(steering, released))
    steps += [*links.remove, *ended]
    steps += split_by_device(sysctls.tighten, links.deleted)[0]
    steps += forgotten(pair for pair in forget if pair not in closed)
    steps += [TranslateConnections(change) for change in unmark]
    before, after = _records(record, actual, needed, links, sysctls)
    return ChangeSet(tuple(steps), before, after, needed_devices(desired) - ready)


def _split(steps: Iterable[_Step], is_first: Callable[[_Step], bool]) -> tuple[list[_Step], list[_Step]]:
    """Those of which that is true, and the rest; both in their order."""
    first: list[_Step] = []
    rest: list[_Step] = []
    for step in steps:
        (first if is_first(step) else rest).append(step)
    return first, rest


def _ends_vrf(route: Route, vrf_tables: set[int]) -> bool:
    """The last route of a VRF's table: as long as the VRF has a device, no look-up may go on to main."""
    return route.type is not RouteType.UNICAST and route.table in vrf_tables


def _ingress_first(actual: Actual, desired: Plan) -> bool:
    """The producer of marks comes last when networks come, and stops first when all of them go.

    Where eBPF takes over from nftables, it must be there before the chain that did its work goes. If marks change
    as well, that chain stays for the transition, and learns the new marks before the program writes them.
    """
    if desired.table is None:
        return True
    stays = desired.transition is not None and any(
        c.name == CLASSIFY_CHAIN for c in desired.transition.chains
    )
    takes_over = actual.table is not None and CLASSIFY_CHAIN in actual.table.chains and not stays
    return takes_over and desired.backend is Backend.EBPF


def _end_of_transition(
    desired: Plan,
    meanwhile: NftTable | None,
    final: NftTable | None,
    closed: tuple[tuple[int, int], ...],
) -> Iterator[Step]:
    """Connections that sent no packet meanwhile are carried over or end, then the old marks are forgotten."""
    if meanwhile is None or meanwhile is final:
        return
    if desired.transition is not None:
        for change in desired.mark_changes:
            yield TranslateConnections(change)
    yield from forgotten(closed)
    last = meanwhile
    if desired.holding is not None:
        # Requests wait while their connections move: one that came first would open a new connection, for good.
        yield NftTransaction(diff_table(as_actual(last), desired.holding, spec=TABLE_SPEC), follows=True)
        for move in desired.zone_changes:
            yield MoveConnections(move)
        last = desired.holding
    yield NftTransaction(diff_table(as_actual(last), final, spec=TABLE_SPEC), follows=True)


def _route_key(route: Route) -> tuple[object, ...]:
    """What the kernel takes for the same route: a second one with this key replaces the first."""
    return route.table, route.destination, route.metric


def _added_routes(actual: Actual, desired: Plan, ready: frozenset[str]) -> Iterator[AddRoute]:
    missing = desired.route_set - actual.routes
    present = {_route_key(route): route for route in actual.routes} if missing else {}
    # The table of a VRF that is not as desired may be anybody's.
    waiting = {vrf.table for vrf in desired.vrfs if vrf.name not in ready}
    for route in sorted(missing, key=Route.sort_key):
        if route.table not in waiting and (not route.device or route.device in ready):
            yield AddRoute(route, present.get(_route_key(route)))


def _removed_routes(actual: Actual, desired: Plan) -> Iterator[DeleteRoute]:
    stale = actual.routes - desired.route_set
    kept = {_route_key(route) for route in desired.routes} if stale else set()
    for route in sorted(stale, key=_removing_order):
        if _route_key(route) not in kept:
            yield DeleteRoute(route)


def _removing_order(route: Route) -> tuple[int | str, ...]:
    """First what refuses, then the shortest prefixes: what a table no longer answers goes on behind its rule.

    So nothing that is left of a table answers for what is gone: no client on the link is sent to the gateway.
    """
    refuses = route.type is not RouteType.UNICAST
    return (route.family, route.table, not refuses, route.destination.prefixlen, *route.sort_key())


def _added_rules(actual: Actual, desired: Plan) -> list[AddRule]:
    missing = desired.rule_set - actual.rules
    return [AddRule(rule) for rule in sorted(missing, key=_adding_order)]


def _removed_rules(actual: Actual, desired: Plan) -> list[DeleteRule]:
    stale = actual.rules - desired.rule_set
    return [DeleteRule(rule) for rule in sorted(stale, key=_adding_order, reverse=True)]


def _adding_order(rule: FibRule) -> tuple[int | str, ...]:
    """Exemptions, then jumps, then look-ups; each from the bottom up.

    So nothing is sent away before its exemption is there. A jump leads to where all leaves of its marks stand or will
    stand, so it may come before them: a mark without a leaf walks on behind the tree. Deleting goes the other way.
    """
    return (rule_phase(rule), rule.family, -rule.priority, *rule.sort_key()[2:])


def _ingress_differs(actual: Actual, program: IngressProgram, released: frozenset[str]) -> bool:
    wanted = frozenset(program.attachments)
    # Our qdisc on a device that is not ours any more: its removal failed.
    orphans = released & actual.ingress.clsact
    return actual.ingress.attached != wanted or bool(actual.ingress.differences or orphans)


def _filtered(actual: Actual, program: IngressProgram) -> frozenset[str]:
    """Devices that get or keep a filter although there is tcx; what serves a device already stays as it is."""
    if actual.ingress.hook is not Hook.TCX:
        return frozenset()
    wanted = frozenset(program.attachments)
    new = wanted - actual.ingress.attached - actual.ingress.taken
    return wanted & actual.ingress.filtered | (new if len(new) >= MANY_DEVICES else frozenset())


def _needed_clsact(actual: Actual, program: IngressProgram, steering: SteeringProgram) -> frozenset[str]:
    if actual.ingress.hook is not Hook.CLSACT:
        return frozenset()
    return frozenset((*program.attachments, *steering.attachments))


def _kept_clsact(desired: Plan, record: Record) -> frozenset[str]:
    """Our qdiscs that stay, needed or not: those of the plan's devices.

    While the kernel adds or removes one, the device drops what it has to send: `qdisc_graft` deactivates it for some
    milliseconds, for an ingress qdisc, too. So the qdisc of a device that is served goes with its last network.
    """
    return record.clsact & (needed_devices(desired) | set(desired.steering.attachments))


def _records(
    record: Record,
    actual: Actual,
    needed: frozenset[str],
    links: LinkChanges,
    sysctls: SysctlChanges,
) -> tuple[Record, Record]:
    clsact = (record.clsact & actual.ingress.clsact) | (needed - actual.ingress.clsact)
    before = Record(
        sysctls.saved,
        record.links | links.created,
        record.clsact | clsact,
        record.slaves | links.slaves,
    )
    after = Record(
        {key: saved for key, saved in sysctls.saved.items() if key not in sysctls.released},
        (record.links | links.created) - links.deleted,
        clsact & needed,
        links.kept_slaves,
    )
    return before, after
