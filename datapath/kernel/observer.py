# SPDX-License-Identifier: Apache-2.0
"""Read the namespace: facts for the compiler, the actual state for reconciliation. Changes nothing."""

from __future__ import annotations

from datapath.facts import Facts
from datapath.kernel import ingress, nft, sysctl
from datapath.kernel.ids import LiveIds, parse_ids
from datapath.kernel.marks_in_use import observe_marks
from datapath.kernel.rtnl import Rtnl
from datapath.plan.model import Plan
from datapath.plan.nft import TABLE_FAMILY, TABLE_NAME
from datapath.reconcile.actual import Actual, ForeignMark
from datapath.reconcile.conflicts import new_tables
from datapath.reconcile.present import carried_program
from datapath.state import State


def observe_facts(state: State) -> Facts:
    """What the compiler may know of this host. Ids come from the kernel, else from the state."""
    found = nft.list_table(TABLE_FAMILY, TABLE_NAME)
    live = parse_ids(found[1]) if found else LiveIds()
    ids = {item.name: item for item in state.ids} | {item.name: item for item in live.ids}
    with Rtnl() as rtnl:
        links = rtnl.link_facts()
    return Facts(
        links=links,
        ids=tuple(ids[name] for name in sorted(ids)),
        fwmark_mask=live.fwmark_mask or state.fwmark_mask,
        previous_ids=state.ids or live.ids,
        previous_mask=state.fwmark_mask or live.fwmark_mask,
        rule_bank=live.rule_bank,
        forwarding=sysctl.forwarding(),
    )


def _foreign_marks(desired: Plan, comments: list[str]) -> tuple[ForeignMark, ...]:
    """Listing everybody's rules is dear on a large node: only before a mask is claimed, not in every round."""
    claims = any(ids.fwmark for ids in desired.ids)
    if not claims or parse_ids(comments).fwmark_mask == desired.fwmark_mask:
        return ()
    return observe_marks()


def observe_links() -> Facts:
    """What a normal user may see: devices, addresses and forwarding, but no nftables and so no ids."""
    with Rtnl() as rtnl:
        return Facts(links=rtnl.link_facts(), forwarding=sysctl.forwarding())


def observe(desired: Plan, state: State) -> Actual:
    """The actual state, as far as the plan, our own objects and conflicts with it are concerned."""
    found = nft.list_table(TABLE_FAMILY, TABLE_NAME)
    keys = {setting.key for setting in desired.sysctls} | set(state.record.sysctls)
    with Rtnl() as rtnl:
        links = rtnl.links()
        rules, foreign_rules = rtnl.rules()
        partial = Actual(rules=rules)
        return Actual(
            table=found[0] if found else None,
            rules=rules,
            routes=rtnl.routes(),
            foreign_rules=foreign_rules,
            foreign_tables=rtnl.foreign_routes(sorted(new_tables(partial, desired))),
            foreign_marks=_foreign_marks(desired, found[1] if found else []),
            links=links,
            sysctls=sysctl.observe(keys),
            ingress=ingress.observe(carried_program(desired, links)),
        )
