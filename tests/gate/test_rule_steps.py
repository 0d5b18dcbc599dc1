# SPDX-License-Identifier: Apache-2.0
"""How many ip rules one routing look-up walks, and how many objects a policy needs: neither may grow unnoticed.

One rule is 3 to 4 ns a walk (docs/performance.md). A packet that a VLAN brings is routed once, a reply twice.
"""

from __future__ import annotations

from typing import Final

import pytest

from datapath.compiler import compile_policy
from datapath.facts import Facts
from datapath.plan.model import Plan
from datapath.plan.rtnl import Family
from tests.unit.compiler.walk import RuleList, policy, tables_of

#: Networks -> the worst walk of any mark, that of an unmarked packet, ip rules of one family.
BUDGET: Final = {
    1: (1, 1, 1),
    4: (5, 2, 8),
    16: (10, 2, 25),
    100: (14, 2, 137),
    1000: (20, 2, 1336),
    4094: (24, 2, 5460),
}
#: The last marks have the longest walks: they take the last branch of every node.
_LOOKED_UP: Final = 200
#: Of one network with both families: on-link prefix, gateway, unreachable default; IPv6 link-local besides.
ROUTES_A_NETWORK: Final = 7


def compiled(networks: int) -> Plan:
    return compile_policy(policy([{}] * networks), Facts())


@pytest.mark.parametrize("networks", BUDGET)
def test_steps_of_the_worst_look_up(networks: int) -> None:
    plan = compiled(networks)
    for family in Family:
        rules = RuleList([rule for rule in plan.rules if rule.family is family])
        steps = [rules.look_up(mark)[1] for mark in sorted(tables_of(plan))[-_LOOKED_UP:]]
        assert (max(steps), rules.look_up(0)[1], len(rules.rules)) == BUDGET[networks]


def test_routes_of_a_network() -> None:
    assert len(compiled(10).routes) == 10 * ROUTES_A_NETWORK
