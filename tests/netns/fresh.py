# SPDX-License-Identifier: Apache-2.0
"""One apply on a new node, to compare a node with that has been through much."""

from __future__ import annotations

import re

from datapath.kernel.executor import Executor
from datapath.kernel.observer import observe
from datapath.plan.model import Plan
from datapath.reconcile.actual import Record
from datapath.reconcile.diff import reconcile
from datapath.reconcile.steps import ForgetConnections, Step, SyncIngress
from datapath.state import State

_NFT_OBJECT = re.compile(r"^\t(?:chain|map|set) .*?^\t}", re.MULTILINE | re.DOTALL)


def converge(plan: Plan, record: Record) -> None:
    """Make the current namespace as the plan says, but for the eBPF program."""
    changes = reconcile(observe(plan, State()), plan, record)
    with Executor() as executor:
        for step in changes.steps:
            if not isinstance(step, SyncIngress | ForgetConnections):
                executor.run(step)


def differences(plan: Plan) -> list[Step]:
    """What the current namespace lacks."""
    changes = reconcile(observe(plan, State()), plan, Record())
    return [step for step in changes.steps if not isinstance(step, SyncIngress)]


def normal(part: str, text: str) -> str:
    """Without what only tells how old things are: rules of one priority exclude each other, chains have names."""
    if part == "nft":
        return "\n".join(sorted(_NFT_OBJECT.findall(text)))
    return "\n".join(sorted(text.splitlines()))
