# SPDX-License-Identifier: Apache-2.0
"""A policy on a node, as the checks of `datapath doctor` look at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from datapath.facts import LinkFacts
from datapath.kernel.who_answers import Answer, Question
from datapath.plan.model import Plan
from datapath.policy import Policy
from datapath.reconcile.actual import Actual
from datapath.reconcile.steps import Step
from datapath.state import State


@dataclass(frozen=True, slots=True)
class PolicyView:
    """A policy on this node.

    Attributes:
        drift: steps that would make the kernel as the plan says.
        waiting: devices that are missing or down.
        is_in_force: the policy is the one in force; else one that is to be.
        zones: of connection tracking that others use, with who does; only looked at where ours are.
        links: devices of the node.
        heard: who answers for gateways, and for the addresses of `egress`.
        source_nat: chains of others that translate sources, with their priority; only looked at with `egress`.
    """

    policy: Policy
    plan: Plan
    actual: Actual
    state: State
    drift: tuple[Step, ...] = ()
    waiting: frozenset[str] = frozenset()
    is_in_force: bool = True
    zones: Mapping[int, str] = field(default_factory=dict)
    links: tuple[LinkFacts, ...] = ()
    heard: Mapping[Question, Answer] = field(default_factory=dict)
    source_nat: tuple[tuple[str, int], ...] = ()
