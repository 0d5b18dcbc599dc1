# SPDX-License-Identifier: Apache-2.0
"""Orders that an apply must not have, to show that `tools.bench.changes` sees what they lose.

Each takes the steps that the engine chose and returns the same change done wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final

from datapath import controller
from datapath.plan.ingress import IngressProgram
from datapath.plan.model import Plan
from datapath.plan.render import render_table
from datapath.reconcile.diff import TABLE_SPEC, ChangeSet
from datapath.reconcile.steps import (
    AddRoute,
    AddRule,
    DeleteRoute,
    DeleteRule,
    NftTransaction,
    Step,
    SyncIngress,
)

Steps = tuple[Step, ...]


def _rules_removed_first(steps: Steps, _desired: Plan) -> Steps:
    """Old rules go before the new ones are there."""
    stale = tuple(step for step in steps if isinstance(step, DeleteRule))
    return (*stale, *(step for step in steps if not isinstance(step, DeleteRule)))


def _table_made_anew(steps: Steps, desired: Plan) -> Steps:
    """The nft table is deleted, then loaded: two transactions."""
    table = desired.table
    if table is None or not any(isinstance(step, NftTransaction) for step in steps):
        return steps
    anew = (
        NftTransaction(f"add table {TABLE_SPEC}\ndelete table {TABLE_SPEC}\n"),
        NftTransaction(render_table(table), follows=True),
    )
    first = next(index for index, step in enumerate(steps) if isinstance(step, NftTransaction))
    rest = tuple(step for step in steps[first:] if not isinstance(step, NftTransaction))
    return (*steps[:first], *anew, *rest)


def _program_detached_first(steps: Steps, _desired: Plan) -> Steps:
    """The eBPF program leaves its devices before the new one is attached."""
    result: list[Step] = []
    for step in steps:
        if isinstance(step, SyncIngress) and step.program.networks:
            result.append(SyncIngress(IngressProgram(step.program.fwmark_mask), step.clsact))
        result.append(step)
    return tuple(result)


def _routes_removed_first(steps: Steps, _desired: Plan) -> Steps:
    """A route is deleted and added instead of replaced."""
    result: list[Step] = []
    for step in steps:
        if isinstance(step, AddRoute) and step.replaces is not None:
            result += [DeleteRoute(step.replaces), AddRoute(step.route)]
        else:
            result.append(step)
    return tuple(result)


def _rules_added_last(steps: Steps, _desired: Plan) -> Steps:
    """The producer of marks comes before the rules that its marks need."""
    late = tuple(step for step in steps if isinstance(step, AddRule))
    return (*(step for step in steps if not isinstance(step, AddRule)), *late)


ORDERS: Final[dict[str, Callable[[Steps, Plan], Steps]]] = {
    "rules-removed-first": _rules_removed_first,
    "rules-added-last": _rules_added_last,
    "routes-removed-first": _routes_removed_first,
    "table-made-anew": _table_made_anew,
    "program-detached-first": _program_detached_first,
}


def install(name: str) -> None:
    """Let this process apply in that order from now on."""
    engine, wrong = vars(controller), ORDERS[name]
    right = engine["reconcile"]

    def reconcile(actual: Any, desired: Plan, *arguments: Any, **options: Any) -> ChangeSet:
        changes: ChangeSet = right(actual, desired, *arguments, **options)
        return dataclasses.replace(changes, steps=wrong(changes.steps, desired))

    engine["reconcile"] = reconcile
