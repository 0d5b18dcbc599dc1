# SPDX-License-Identifier: Apache-2.0
"""Which steps travel together, and which must wait for those before them."""

from __future__ import annotations

from ipaddress import IPv4Network

from datapath.plan.rtnl import Family, FibRule, Route, RuleAction
from datapath.reconcile.batches import BATCH_MAX, batches
from datapath.reconcile.steps import AddRoute, AddRule, DeleteRoute, DeleteRule, SetLinkUp, SetSysctl, Step

EXEMPTION = FibRule(Family.IPV4, 1, RuleAction.GOTO, 9, destination=IPv4Network("10.0.0.0/8"))
LOOKUP = FibRule(Family.IPV4, 2, RuleAction.LOOKUP, 100, fwmark=1, fwmask=3)
SHORT_CUT = FibRule(Family.IPV4, 3, RuleAction.GOTO, 9, fwmark=0, fwmask=3)
ROUTE = Route(100, IPv4Network("0.0.0.0/0"), "eth1")
OTHER_ROUTE = Route(101, IPv4Network("0.0.0.0/0"), "eth2")


def together(*steps: Step) -> list[int]:
    """Sizes of the batches; nothing is lost and nothing changes places."""
    made = list(batches(steps))
    assert [step for batch in made for step in batch] == list(steps)
    return [len(batch) for batch in made]


def test_routes_travel_together_also_where_some_replace() -> None:
    assert together(AddRoute(ROUTE), AddRoute(OTHER_ROUTE, OTHER_ROUTE)) == [2]


def test_another_kind_waits() -> None:
    assert together(AddRoute(ROUTE), AddRule(LOOKUP), DeleteRule(LOOKUP), DeleteRoute(ROUTE)) == [1, 1, 1, 1]


def test_a_look_up_waits_for_its_exemption_and_for_the_short_cuts() -> None:
    rules = [EXEMPTION, SHORT_CUT, SHORT_CUT, LOOKUP, LOOKUP]
    assert together(*map(AddRule, rules)) == [1, 2, 2]
    assert together(*map(DeleteRule, reversed(rules))) == [2, 2, 1]


def test_what_the_kernel_takes_one_by_one_stays_alone() -> None:
    assert (
        together(SetSysctl("a", "1", "0"), SetSysctl("b", "1", "0"), SetLinkUp("eth1"), SetLinkUp("eth2"))
        == [1] * 4
    )


def test_a_batch_has_a_limit() -> None:
    assert together(*[AddRule(LOOKUP)] * (2 * BATCH_MAX + 1)) == [BATCH_MAX, BATCH_MAX, 1]
