# SPDX-License-Identifier: Apache-2.0
"""How many ip rules one routing look-up walks, and how many objects a policy needs: neither may grow unnoticed.

A rule that is passed by is 1 ns a walk, a jump that is taken 11 (docs/performance.md). A packet that a VLAN brings is
routed once, a reply twice.
"""

from __future__ import annotations

from typing import Final

import pytest

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family
from tests.unit.compiler.walk import RuleList, policy, tables_of

#: Networks -> the worst walk of any mark, the mean of all, that of an unmarked packet, ip rules of one family.
BUDGET: Final = {
    1: (1, 1, 1, 1),
    4: (5, 4, 2, 8),
    16: (9, 6.7, 2, 24),
    100: (12, 9.2, 2, 130),
    1000: (17, 12.5, 2, 1254),
    4094: (20, 14.8, 2, 5119),
}
#: Of one network with both families: on-link prefix, gateway, unreachable default; IPv6 link-local besides.
ROUTES_A_NETWORK: Final = 7


def compiled(networks: int) -> Plan:
    return compile_policy(policy([{}] * networks), Facts())


@pytest.mark.parametrize("networks", BUDGET)
def test_steps_of_a_look_up(networks: int) -> None:
    plan = compiled(networks)
    for family in Family:
        rules = RuleList([rule for rule in plan.rules if rule.family is family])
        steps = [rules.look_up(mark)[1] for mark in tables_of(plan)]
        worst, mean, unmarked, count = BUDGET[networks]
        assert (max(steps), rules.look_up(0)[1], len(rules.rules)) == (worst, unmarked, count)
        assert mean - 0.1 <= sum(steps) / len(steps) <= mean


def test_routes_of_a_network() -> None:
    assert len(compiled(10).routes) == 10 * ROUTES_A_NETWORK
