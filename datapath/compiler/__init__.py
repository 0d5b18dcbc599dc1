# SPDX-License-Identifier: Apache-2.0
"""Pure: (policy, facts) -> plan. One module per feature; no kernel, no files, no clock."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

from datapath.compiler.acceleration import acceleration_notes, find_refused
from datapath.compiler.backend import choose_backend
from datapath.compiler.context import Context, NetworkContext, Treatment, treat
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
from datapath.compiler.kept import Kept
from datapath.compiler.notes import emit_notes
from datapath.compiler.routes import emit_routes, external_tables
from datapath.compiler.rules import choose_bank, emit_rules
from datapath.compiler.steering import emit_steering, find_refusals, steering_notes
from datapath.compiler.tables import emit_tables
from datapath.compiler.vrf import emit_slaves, emit_vrfs, vrf_notes
from datapath.facts import Facts
from datapath.plan.egress import egress_name
from datapath.plan.model import NetworkIds, Plan
from datapath.plan.rtnl import Family
from datapath.policy import Network, Policy

__all__ = ["Compiler", "compile_policy", "with_members"]

_NAME = attrgetter("name")


class Compiler:
    """Compiles again and again, as a daemon does: what is as it was for the plan before is taken over from that."""

    def __init__(self) -> None:
        self._kept = Kept()
        self._made: tuple[Context, Plan] | None = None

    def plan(self, policy: Policy, facts: Facts) -> Plan:
        """As `compile_policy`, with an equal plan.

        Raises:
            CompileError: as that.
        """
        before = None
        if self._made is not None:
            before, plan = self._made
            # The very same policy: equal ones may differ in what was said aloud, which is not compared.
            if before.policy is policy and before.facts == facts:
                return plan
        # One that fails half way has changed what is kept, and leaves nothing to compare with.
        self._made = None
        self._kept.begin()
        context = _context(policy, facts, before, self._kept)
        plan = _compile(context)
        self._made = context, plan
        return plan


def compile_policy(policy: Policy, facts: Facts) -> Plan:
    """Compile a policy for one host. The same input gives an equal plan.

    Raises:
        CompileError: the policy cannot hold on this host; all problems at once.
    """
    return _compile(_context(policy, facts))


def _context(
    policy: Policy, facts: Facts, before: Context | None = None, kept: Kept | None = None
) -> Context:
    """The policy on this host, compared with what was compiled before."""
    links = {link.name: link for link in facts.links}
    same_links: frozenset[str] = frozenset()
    known: dict[str, NetworkContext] = {}
    if before is not None:
        same_links = frozenset(link.name for link in before.facts.links if links.get(link.name) == link)
        by_name = {network.name: network for network in policy.networks}
        known = {
            earlier.name: earlier
            for earlier in before.networks
            if by_name.get(earlier.name) is earlier.network
            and (earlier.device in same_links or (earlier.link is None and earlier.device not in links))
        }

    def treated(network: Network) -> Mapping[Family, Treatment]:
        earlier, steering = known.get(network.name), policy.steering_of(network)
        if earlier is not None and before is not None and before.policy.steering_of(network) is steering:
            return earlier.treatments
        return treat(network, links.get(network.device), steering)

    treatments = [treated(network) for network in policy.networks]
    ids = allocate(policy, facts, treatments)
    networks = tuple(
        NetworkContext(network, position, links.get(network.device), by_family, ids[network.name])
        for position, (network, by_family) in enumerate(zip(policy.networks, treatments, strict=True))
    )
    down, down_before = facts.gateways_down, before.facts.gateways_down if before else {}
    return Context(
        policy,
        facts,
        policy.marks.effective_mask,
        networks,
        tuple(ids.values()),
        {entry.network: ids[egress_name(entry.network)].fwmark for entry in policy.egress},
        kept or Kept(),
        frozenset(
            network.name
            for network in networks
            if (earlier := known.get(network.name)) is not None
            and earlier.ids == network.ids
            and earlier.treatments == network.treatments
            and down.get(network.name) == down_before.get(network.name)
        ),
        same_links,
    )


def _compile(context: Context) -> Plan:
    entries = resolve_egress(context)
    rule_bank = choose_bank(context)
    program = emit_ingress(context, source_addresses(entries))
    backend, reason = choose_backend(context, program)
    tables = emit_tables(context, program, backend, rule_bank, emit_egress(context, entries))
    refusals = find_refusals(context)
    return Plan(
        fwmark_mask=context.mask,
        ids=tuple(sorted((item for item in context.ids if item != NetworkIds(item.name)), key=_NAME)),
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
