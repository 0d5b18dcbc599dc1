# SPDX-License-Identifier: Apache-2.0
"""`datapath doctor`: what on this node stands in the way of the datapath, who owns it, what to do.

It only looks. The facts are gathered here; what they mean is decided by pure functions (`doctor_host`,
`doctor_policy`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from datapath.compiler import compile_policy
from datapath.errors import CompileError, DatapathError
from datapath.in_force import parse_in_force
from datapath.kernel.guardian import boot_clock_s
from datapath.kernel.host import HostView, observe_host
from datapath.kernel.observer import observe, observe_facts, tables_of_others
from datapath.kernel.rtnl import Rtnl
from datapath.kernel.rules_of_others import source_nat_chains
from datapath.kernel.who_answers import who_answers
from datapath.kernel.zones_in_use import observe_zones
from datapath.observe.doctor_egress import address_questions
from datapath.observe.doctor_gateways import gateway_questions
from datapath.observe.doctor_host import check_host
from datapath.observe.doctor_policy import check_marks_without_policy, check_policy
from datapath.observe.findings import Finding, Report, fail, ok
from datapath.observe.policy_view import PolicyView
from datapath.plan.model import Plan
from datapath.policy import LoadedPolicy
from datapath.reconcile.diff import reconcile
from datapath.state import State, StateDirectory


def examine(directory: StateDirectory, loaded: LoadedPolicy | None) -> Report:
    """Look at the node.

    Args:
        directory: of this namespace.
        loaded: a policy that is to be applied here; None for the one in force, if there is one.
    """
    host = observe_host(directory)
    # A state that cannot be read is a finding, and the rest is looked at without it.
    state = State() if host.directory.damage else directory.load()
    findings: list[Finding] = []
    uses_rules = False
    try:
        view = _view(state, loaded, host)
    except DatapathError as error:
        findings.append(
            fail(
                "policy",
                str(error),
                "it cannot be applied or healed here",
                error.hint or "correct the policy",
            )
        )
    else:
        if view is not None:
            uses_rules = view.is_in_force and bool(view.plan.rules)
            findings += check_policy(host, view, boot_clock_s())
        else:
            findings += _without_policy(host, state)
    return Report((*check_host(host, uses_rules=uses_rules), *findings))


def _without_policy(host: HostView, state: State) -> Iterator[Finding]:
    yield ok("generation", "no policy is in force: only the node was looked at")
    yield from check_marks_without_policy(host, observe(Plan(state.fwmark_mask), state))


def _view(state: State, loaded: LoadedPolicy | None, host: HostView) -> PolicyView | None:
    is_in_force = bool(state.policy) and (loaded is None or loaded.source.text == state.policy)
    if loaded is None:
        if not state.policy:
            return None
        loaded = parse_in_force(state)
    facts = observe_facts(state, policies=(loaded.source.text,))
    if is_in_force:
        facts = facts.model_copy(update={"ebpf_refused": state.ebpf_refused})
    try:
        plan = compile_policy(loaded.policy, facts)
    except CompileError as error:
        raise loaded.source.error(error.problems) from error
    actual = dataclasses.replace(observe(plan, state), foreign_marks=host.marks)
    if plan.external_tables:
        with Rtnl() as rtnl:
            external = rtnl.foreign_routes(plan.external_tables, by_kernel=False)
        actual = dataclasses.replace(actual, foreign_tables={**actual.foreign_tables, **external})
    if is_in_force:
        late = tables_of_others(plan)
        actual = dataclasses.replace(actual, foreign_tables={**actual.foreign_tables, **late})
    changes = reconcile(actual, plan, state.record)
    zones = observe_zones() if any(ids.zone for ids in plan.ids) else {}
    drift = changes.steps if is_in_force else ()
    return PolicyView(
        loaded.policy,
        plan,
        actual,
        state,
        drift,
        changes.waiting,
        is_in_force,
        zones,
        links=facts.links,
        heard=who_answers((*gateway_questions(plan), *address_questions(plan))),
        source_nat=tuple(source_nat_chains()) if plan.egress else (),
    )
