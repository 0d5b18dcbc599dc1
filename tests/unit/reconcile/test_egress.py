# SPDX-License-Identifier: Apache-2.0
"""Connections of an entry that goes are closed before its rules are gone, also after a kill in between."""

from __future__ import annotations

import dataclasses

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.plan.egress import RETIRED_SET
from datapath.plan.model import Plan
from datapath.plan.nft import NftTable
from datapath.reconcile.actual import Actual, Record
from datapath.reconcile.diff import reconcile
from datapath.reconcile.egress import with_retired
from datapath.reconcile.nft import as_actual
from datapath.reconcile.steps import ForgetConnections, NftTransaction, Step
from tests.unit.compiler.walk import facts_after, policy

MASK = 0x0FFF0000
INSIDE = {"internal": ["10.96.0.0/11"]}


def entry(name: str, network: str) -> dict[str, object]:
    source = f"10.112.{len(name)}.0/24"
    return {"name": name, "network": network, "sources": [source], "source_ip": "network"}


def plan_of(*entries: dict[str, object], facts: Facts | None = None, **top: object) -> Plan:
    return compile_policy(policy([{}, {}], node=INSIDE, egress=list(entries), **top), facts or Facts())


BOTH = plan_of(entry("a", "n0"), entry("bb", "n1"))
E0, E1 = (next(ids.fwmark for ids in BOTH.ids if ids.name == f"n{n}.egress") for n in (0, 1))


def actual(table: NftTable | None, mask: int = MASK) -> Actual:
    return Actual(table=as_actual(table) if table else None, fwmark_mask=mask)


def about_connections(steps: tuple[Step, ...]) -> list[Step]:
    return [step for step in steps if isinstance(step, NftTransaction | ForgetConnections)]


def test_what_stays_is_not_closed() -> None:
    again = plan_of(entry("a", "n0"), entry("bb", "n1"), entry("ccc", "n0"), facts=facts_after(BOTH))
    steps = about_connections(reconcile(actual(BOTH.table), again, Record()).steps)
    assert not [step for step in steps if isinstance(step, ForgetConnections)]
    assert RETIRED_SET not in str(steps)


def test_a_new_set_is_filled_before_a_rule_asks_for_it() -> None:
    again = plan_of(entry("a", "n0"), entry("bb", "n1"), entry("ccc", "n0"), facts=facts_after(BOTH))
    ahead, rules = (
        s for s in reconcile(actual(BOTH.table), again, Record()).steps if isinstance(s, NftTransaction)
    )
    (name,) = (
        [item.name for item in again.table.maps if item.name.startswith("sources4.ccc.")]
        if again.table
        else [""]
    )
    assert ahead.text == (
        f"add set inet datapath {name} {{ type ipv4_addr; flags interval; }}\n"
        f"add element inet datapath {name} {{ 10.112.3.0/24 }}\n"
    )
    assert f"ct original ip saddr @{name} " in rules.text
    # What a set holds is in its name: one that changes is another one.
    changed = plan_of(
        entry("a", "n0") | {"sources": ["10.112.9.0/24"]}, entry("bb", "n1"), facts=facts_after(BOTH)
    )
    first, _ = (
        s for s in reconcile(actual(BOTH.table), changed, Record()).steps if isinstance(s, NftTransaction)
    )
    assert "add element" in first.text
    assert "delete element" not in first.text


def test_what_goes_is_closed_between_two_transactions() -> None:
    one = plan_of(entry("a", "n0"), facts=facts_after(BOTH))
    first, forget, last = about_connections(reconcile(actual(BOTH.table), one, Record()).steps)
    assert isinstance(first, NftTransaction)
    assert f"add element inet datapath {RETIRED_SET} {{ {E1:#010x} }}" in first.text
    assert f"ct mark & {MASK:#010x} @{RETIRED_SET} drop" in first.text
    assert "priority 300" in first.text
    assert forget == ForgetConnections(E1, MASK)
    assert isinstance(last, NftTransaction)
    assert last.follows
    assert f"delete set inet datapath {RETIRED_SET}" in last.text


def test_a_teardown_closes_all_of_them_first() -> None:
    marks = ((E0, MASK), (E1, MASK), (0x00010000, MASK))
    steps = about_connections(reconcile(actual(BOTH.table), Plan(MASK), Record(), forget=marks).steps)
    assert [step.describe() for step in steps[1:]] == [
        f"delete conntrack entries with mark {E0:#010x}/{MASK:#010x}",
        f"delete conntrack entries with mark {E1:#010x}/{MASK:#010x}",
        "nft transaction of 1 command",
        "delete conntrack entries with mark 0x00010000/0x0fff0000",
    ]


def test_a_kill_in_between_is_completed() -> None:
    """The next run finds the table of the time in between, whoever runs it and whatever it wants."""
    one = plan_of(entry("a", "n0"), facts=facts_after(BOTH))
    between = with_retired(one.table, (E1,), MASK)
    forget, last = about_connections(reconcile(actual(between), one, Record()).steps)
    assert forget == ForgetConnections(E1, MASK)
    assert isinstance(last, NftTransaction)
    back = about_connections(reconcile(actual(between), BOTH, Record()).steps)
    assert not [step for step in back if isinstance(step, ForgetConnections)]


def test_another_mask_carries_them_over() -> None:
    facts = facts_after(BOTH)
    facts = facts.model_copy(update={"previous_ids": facts.ids, "previous_mask": facts.fwmark_mask})
    other = plan_of(entry("a", "n0"), entry("bb", "n1"), facts=facts, marks={"mask": 0x7F000000})
    assert {change.name for change in other.mark_changes} >= {"n0.egress", "n1.egress"}
    steps = reconcile(actual(BOTH.table), other, Record()).steps
    assert not [step for step in steps if isinstance(step, ForgetConnections)]
    gone = plan_of(entry("a", "n0"), facts=facts, marks={"mask": 0x7F000000})
    steps = reconcile(actual(BOTH.table), gone, Record()).steps
    assert [step for step in steps if isinstance(step, ForgetConnections)] == [ForgetConnections(E1, MASK)]


def test_a_table_that_is_gone_closes_nothing() -> None:
    steps = reconcile(actual(None), BOTH, Record()).steps
    assert not [step for step in steps if isinstance(step, ForgetConnections)]
    settled = dataclasses.replace(BOTH, mark_changes=())
    assert about_connections(reconcile(actual(BOTH.table), settled, Record()).steps) == []
