# SPDX-License-Identifier: Apache-2.0
"""From actual to desired: an ordered list of steps.

The order is the point. Consumers come before producers, permissive before strict: a mark must find
its rule, a rule its table, and a table its routes, at every moment in between. Removal runs the other
way. So no packet of a flow that both the old and the new policy serve meets a half-made state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from datapath.plan.ingress import IngressProgram, VlanProtocol
from datapath.plan.model import Backend, MarkChange, Plan
from datapath.plan.nft import CLASSIFY_CHAIN, TABLE_FAMILY, TABLE_NAME
from datapath.plan.rtnl import FibRule, Route, VlanLink
from datapath.plan.steering import SteeringProgram
from datapath.plan.tc import MANY_DEVICES, Hook
from datapath.reconcile.actual import Actual, Record
from datapath.reconcile.batches import rule_phase
from datapath.reconcile.nft import as_actual, diff_table
from datapath.reconcile.present import (
    carried_program,
    carried_steering,
    needed_devices,
    ready_devices,
)
from datapath.reconcile.steps import (
    AddLink,
    AddRoute,
    AddRule,
    DeleteLink,
    DeleteRoute,
    DeleteRule,
    ExtendSteering,
    ForgetConnections,
    MoveConnections,
    NftTransaction,
    SetLinkUp,
    Step,
    SyncIngress,
    TranslateConnections,
    TrimSteering,
)
from datapath.reconcile.sysctls import SysctlChanges, diff_sysctls, inherited, split_by_device

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
    ready = ready_devices(desired, actual.links)
    links = _diff_links(actual, desired, record, ready)
    values = inherited(actual.sysctls, links.created) | dict(actual.sysctls)
    sysctls = diff_sysctls(values, desired.sysctls, desired.rp_filter_exempt, record)
    early, late = split_by_device(sysctls.loosen, links.created)
    steps: list[Step] = [*early, *links.add, *late]
    steering = carried_steering(desired, actual.links)
    if actual.steering.missing:
        steps.append(ExtendSteering(steering))
    # An empty table answers nothing, so the walk goes on as without the rule. The other way round, Linux would walk
    # every route of every IPv6 table for each rule (`fib6_rule_flush_cache`): 5 s instead of 1 for 4,094 networks.
    steps += [*_added_rules(actual, desired), *_added_routes(actual, desired, ready)]
    text = diff_table(actual.table, desired.transition or desired.table, spec=TABLE_SPEC)
    program = carried_program(desired, actual.links)
    filtered = _filtered(actual, program)
    needed = _needed_clsact(actual, program, steering) | filtered | _kept_clsact(desired, record)
    released = record.clsact - needed
    ingress = (
        [SyncIngress(program, released, filtered, actual.ingress.stays)]
        if _ingress_differs(actual, program, released)
        else []
    )
    nft = [NftTransaction(text)] if text else []
    steps += [*ingress, *nft] if _ingress_first(actual, desired) else [*nft, *ingress]
    steps += [*_removed_rules(actual, desired), *_removed_routes(actual, desired)]
    steps += _end_of_transition(desired)
    if actual.steering.surplus:
        steps.append(TrimSteering(steering, released))
    steps += links.remove
    steps += split_by_device(sysctls.tighten, frozenset(step.link.name for step in links.remove))[0]
    steps += [ForgetConnections(mark, mask) for mark, mask in forget]
    steps += [TranslateConnections(change) for change in unmark]
    before, after = _records(record, actual, needed, links, sysctls)
    return ChangeSet(tuple(steps), before, after, needed_devices(desired) - ready)


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


def _end_of_transition(desired: Plan) -> Iterator[Step]:
    """Connections that sent no packet meanwhile are carried over, then the old marks are forgotten."""
    if desired.transition is None:
        return
    for change in desired.mark_changes:
        yield TranslateConnections(change)
    last = desired.transition
    if desired.holding is not None:
        # Requests wait while their connections move: one that came first would open a new connection, for good.
        yield NftTransaction(diff_table(as_actual(last), desired.holding, spec=TABLE_SPEC), follows=True)
        for move in desired.zone_changes:
            yield MoveConnections(move)
        last = desired.holding
    yield NftTransaction(diff_table(as_actual(last), desired.table, spec=TABLE_SPEC), follows=True)


@dataclass(frozen=True, slots=True)
class _LinkChanges:
    add: tuple[Step, ...]
    remove: tuple[DeleteLink, ...]
    created: frozenset[str]


def _diff_links(actual: Actual, desired: Plan, record: Record, ready: frozenset[str]) -> _LinkChanges:
    add: list[Step] = []
    created: set[str] = set()
    wanted = {link.name for link in desired.links}
    for link in desired.links:
        present = actual.links.get(link.name)
        if link.name not in ready:
            continue
        if present is None:
            add.append(AddLink(link))
            created.add(link.name)
        elif not present.up:
            add.append(SetLinkUp(link.name))
    remove = []
    for name in sorted(record.links - wanted):
        present = actual.links.get(name)
        # Somebody may have deleted ours and made another device of that name: that one is theirs.
        if present is not None and present.kind == "vlan":
            remove.append(DeleteLink(_as_vlan_link(actual, name)))
    return _LinkChanges(tuple(add), _inner_first(remove), frozenset(created))


def _inner_first(steps: list[DeleteLink]) -> tuple[DeleteLink, ...]:
    """A device before its trunk: with the trunk the kernel takes all devices on it, and the next step would fail."""
    parents = {step.link.name: step.link.parent for step in steps}

    def depth(name: str) -> int:
        steps = 0
        while (name := parents.get(name, "")) in parents and steps < len(parents):
            steps += 1
        return steps

    return tuple(sorted(steps, key=lambda step: (-depth(step.link.name), step.link.name)))


def _as_vlan_link(actual: Actual, name: str) -> VlanLink:
    present = actual.links[name]
    return VlanLink(name, present.parent, present.vlan_id, VlanProtocol(present.vlan_protocol))


def _route_key(route: Route) -> tuple[object, ...]:
    """What the kernel takes for the same route: a second one with this key replaces the first."""
    return route.table, route.destination, route.metric


def _added_routes(actual: Actual, desired: Plan, ready: frozenset[str]) -> Iterator[AddRoute]:
    missing = desired.route_set - actual.routes
    present = {_route_key(route): route for route in actual.routes} if missing else {}
    for route in sorted(missing, key=Route.sort_key):
        if not route.device or route.device in ready:
            yield AddRoute(route, present.get(_route_key(route)))


def _removed_routes(actual: Actual, desired: Plan) -> Iterator[DeleteRoute]:
    stale = actual.routes - desired.route_set
    kept = {_route_key(route) for route in desired.routes} if stale else set()
    for route in sorted(stale, key=Route.sort_key):
        if _route_key(route) not in kept:
            yield DeleteRoute(route)


def _added_rules(actual: Actual, desired: Plan) -> list[AddRule]:
    missing = desired.rule_set - actual.rules
    return [AddRule(rule) for rule in sorted(missing, key=_adding_order)]


def _removed_rules(actual: Actual, desired: Plan) -> list[DeleteRule]:
    stale = actual.rules - desired.rule_set
    return [DeleteRule(rule) for rule in sorted(stale, key=_adding_order, reverse=True)]


def _adding_order(rule: FibRule) -> tuple[int, ...]:
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
    links: _LinkChanges,
    sysctls: SysctlChanges,
) -> tuple[Record, Record]:
    clsact = (record.clsact & actual.ingress.clsact) | (needed - actual.ingress.clsact)
    before = Record(sysctls.saved, record.links | links.created, record.clsact | clsact)
    after = Record(
        {key: saved for key, saved in sysctls.saved.items() if key not in sysctls.released},
        (record.links | links.created) - {step.link.name for step in links.remove},
        clsact & needed,
    )
    return before, after
