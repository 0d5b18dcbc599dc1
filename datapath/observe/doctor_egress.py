# SPDX-License-Identifier: Apache-2.0
"""What `datapath doctor` says about `egress`. Pure: from what was heard to findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from datapath.compiler.egress_chains import SNAT_PRIORITY
from datapath.kernel.who_answers import Answer, Question
from datapath.observe.findings import Finding, fail, ok, warn
from datapath.observe.policy_view import PolicyView
from datapath.plan.egress import EgressEntry
from datapath.plan.model import Plan

#: A large pool is not asked for to its end: who answers for one address of it answers for others.
_ASKED_MAX = 64


def address_questions(plan: Plan) -> tuple[Question, ...]:
    """What is to be asked for `check_egress`: who else has the addresses that connections leave with."""
    return tuple(
        Question(entry.device, address) for entry in plan.egress for address in entry.addresses[:_ASKED_MAX]
    )


def check_egress(view: PolicyView) -> Iterator[Finding]:
    """Findings about the entries of a policy; none without any."""
    plan = view.plan
    if not plan.egress:
        return
    found = [*_addresses(plan, view.heard), *_source_nat(view.source_nat), *_lacking(plan)]
    # The sets of a policy that is to be applied are nobody's business yet.
    if view.is_in_force:
        found += _empty_sets(plan)
    yield from found
    if not found:
        yield ok("egress", f"entries: {len(plan.egress)}; nobody else answers for their addresses")


def _addresses(plan: Plan, heard: Mapping[Question, Answer]) -> Iterator[Finding]:
    for entry in plan.egress:
        others = {
            str(address): answer.link_address
            for address in entry.addresses[:_ASKED_MAX]
            if (answer := heard.get(Question(entry.device, address), Answer())).is_there and not answer.is_own
        }
        if not others:
            continue
        (address, link), *rest = others.items()
        more = f" (and for {len(rest)} more)" if rest else ""
        yield fail(
            "egress",
            f"{entry.name}: {link} on {entry.device} answers for {address}{more}, and that is not this node",
            "answers to its connections go there instead, and these connections hang",
            "let this node announce the address (MetalLB announces a service on one node), run the pods where it is"
            " announced, or take another `source_ip`",
        )


def _source_nat(chains: Iterable[tuple[str, int]]) -> Iterator[Finding]:
    for where, priority in chains:
        if priority <= SNAT_PRIORITY:
            yield warn(
                "egress",
                f"{where} translates sources at priority {priority}, before ours at {SNAT_PRIORITY}",
                "the first that translates a connection decides: what its rules take of our sources is dropped"
                " (`untranslated`)",
                "exclude the sources of `egress` there, or give that chain priority 100 (`srcnat`)",
            )


def _lacking(plan: Plan) -> Iterator[Finding]:
    for entry in plan.egress:
        families = " and ".join(f"IPv{family}" for family in entry.families if entry.lacks_address(family))
        if families:
            yield fail(
                "egress",
                f"{entry.name}: `source_ip: network`, and {entry.device} has no {families} address",
                f"{families} connections of its sources are dropped (`no_address`)",
                f"give {entry.device} an address, or name one in `source_ip`",
            )


def _empty_sets(plan: Plan) -> Iterator[Finding]:
    for entry in plan.egress:
        if entry.members is not None and not entry.members:
            yield warn(
                "egress",
                f"the set of {entry.name} is empty" + _others_of(entry),
                f"whoever is meant to leave by {entry.network} opens connections as without the policy",
                f"`datapath egress set {entry.name} ADDRESS...`, by the program that knows the pods, each time it"
                " starts",
            )


def _others_of(entry: EgressEntry) -> str:
    return ", and it has no other sources" if not entry.sources else ""
