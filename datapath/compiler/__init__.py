# SPDX-License-Identifier: Apache-2.0
"""Pure: (policy, facts) -> plan. One module per feature; no kernel, no files, no clock."""

from __future__ import annotations

from datapath.compiler.acceleration import acceleration_notes, find_refused
from datapath.compiler.backend import choose_backend
from datapath.compiler.context import Context, NetworkContext, treat
from datapath.compiler.egress import (
    egress_notes,
    resolve_egress,
    source_addresses,
    with_members,
)
from datapath.compiler.egress_chains import emit_egress
from datapath.compiler.flowtables import flowtable_notes
from datapath.compiler.gateways import emit_checks
from datapath.compiler.host import emit_links, emit_rp_filter_exempt, emit_sysctls
from datapath.compiler.ids import allocate
from datapath.compiler.ingress import emit_ingress
from datapath.compiler.notes import emit_notes
from datapath.compiler.routes import emit_routes, external_tables
from datapath.compiler.rules import choose_bank, emit_rules
from datapath.compiler.steering import emit_steering, find_refusals, steering_notes
from datapath.compiler.tables import emit_tables
from datapath.compiler.vrf import emit_slaves, emit_vrfs, vrf_notes
from datapath.facts import Facts
from datapath.plan.egress import egress_name
from datapath.plan.model import NetworkIds, Plan
from datapath.policy import Policy

__all__ = ["compile_policy", "with_members"]


class _Last:
    """The plan that was made last: a daemon asks for the same one again and again."""

    def __init__(self) -> None:
        self._made: tuple[Policy, Facts, Plan] | None = None

    def plan(self, policy: Policy, facts: Facts) -> Plan:
        # The very same policy: equal ones may differ in what was said aloud, which is not compared.
        if self._made is None or self._made[0] is not policy or self._made[1] != facts:
            # Let go before a new one is made, so that there are never two.
            self._made = None
            self._made = (policy, facts, _compile(policy, facts))
        return self._made[2]


_last = _Last()


def compile_policy(policy: Policy, facts: Facts) -> Plan:
    """Compile a policy for one host. The same input gives an equal plan.

    Raises:
        CompileError: the policy cannot hold on this host; all problems at once.
    """
    return _last.plan(policy, facts)


def _compile(policy: Policy, facts: Facts) -> Plan:
    links = {link.name: link for link in facts.links}
    treatments = [
        treat(network, links.get(network.device), policy.steering_of(network)) for network in policy.networks
    ]
    ids = allocate(policy, facts, treatments)
    context = Context(
        policy,
        facts,
        policy.marks.effective_mask,
        tuple(
            NetworkContext(network, position, links.get(network.device), treated, ids[network.name])
            for position, (network, treated) in enumerate(zip(policy.networks, treatments, strict=True))
        ),
        {entry.network: ids[egress_name(entry.network)].fwmark for entry in policy.egress},
    )
    entries = resolve_egress(context)
    rule_bank = choose_bank(context)
    program = emit_ingress(context, source_addresses(entries))
    backend, reason = choose_backend(context, program)
    tables = emit_tables(context, program, backend, rule_bank, emit_egress(context, entries))
    refusals = find_refusals(context)
    return Plan(
        fwmark_mask=context.mask,
        ids=tuple(sorted(i for i in ids.values() if i != NetworkIds(i.name))),
        vrfs=emit_vrfs(context),
        links=emit_links(context),
        slaves=emit_slaves(context),
        sysctls=emit_sysctls(context),
        rp_filter_exempt=emit_rp_filter_exempt(context),
        routes=emit_routes(context),
        rules=emit_rules(context, rule_bank=rule_bank),
        external_tables=external_tables(context),
        table=tables.table,
        mark_changes=tables.mark_changes,
        zone_changes=tables.zone_changes,
        transition=tables.transition,
        holding=tables.holding,
        ingress=program,
        steering=emit_steering(context),
        checks=emit_checks(context),
        egress=tuple(item.plan for item in entries),
        refusals=(*refusals, *find_refused(context)),
        backend=backend,
        backend_reason=reason,
        notes=(
            *emit_notes(context),
            *flowtable_notes(context),
            *acceleration_notes(context, tables.table.flowtables if tables.table else ()),
            *vrf_notes(context),
            *egress_notes(context, entries),
            *steering_notes(context, refusals),
            *tables.notes,
        ),
    )
