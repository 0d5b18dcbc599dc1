# SPDX-License-Identifier: Apache-2.0
"""Which steps may travel together: rules and routes by the hundred in one act of the kernel.

The kernel carries out a batch in order and goes on after a refusal. So a batch holds only steps that do no harm
without each other: of one kind, and of rules only those of one phase. Whatever comes next waits for all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby

from datapath.plan.rtnl import FibRule, RuleAction
from datapath.reconcile.steps import AddRoute, AddRule, DeleteRoute, DeleteRule, Step

#: Steps that the kernel can take in batches.
FibStep = AddRoute | DeleteRoute | AddRule | DeleteRule
#: A refusal is noticed after so many steps at the latest.
BATCH_MAX = 256


def rule_phase(rule: FibRule) -> int:
    """Exemptions and ends (0), then jumps inside the tree (1), then look-ups (2); deleting goes the other way."""
    if rule.device:
        return 0
    return 2 if rule.action is RuleAction.LOOKUP else 1 if rule.fwmask else 0


def batches(steps: Iterable[Step]) -> Iterator[tuple[Step, ...]]:
    """The steps in their order; each tuple is for one `run_batch` where it holds `FibStep`s, else a single step."""
    for (kind, _), group in groupby(steps, key=_family):
        together = list(group)
        size = BATCH_MAX if issubclass(kind, FibStep) else 1
        for start in range(0, len(together), size):
            yield tuple(together[start : start + size])


def _family(step: Step) -> tuple[type, int]:
    return type(step), rule_phase(step.rule) if isinstance(step, AddRule | DeleteRule) else 0
