# SPDX-License-Identifier: Apache-2.0
"""`nft-dry-run`: compile, let the real parsers and the kernel check it, and say what would change."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from datapath.controller import Controller, compile_located
from datapath.errors import DatapathError
from datapath.facts import Facts
from datapath.kernel import sandbox
from datapath.kernel.ingress import verify
from datapath.kernel.observer import observe_links
from datapath.plan.model import Plan
from datapath.plan.render import plan_digest, render_table
from datapath.policy import LoadedPolicy
from datapath.reconcile.steps import NftTransaction, Step
from datapath.state import StateDirectory


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        result: `ok`, or why it was not done. A check that fails raises instead.
    """

    name: str
    result: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a dry run found.

    Attributes:
        changes: what an apply would do here; None where the live node was not compared.
    """

    plan: Plan
    checks: tuple[Check, ...]
    changes: tuple[Step, ...] | None

    def as_json(self) -> dict[str, Any]:
        return {
            "digest": plan_digest(self.plan),
            "checks": {check.name: check.result for check in self.checks},
            "notes": [note.render() for note in self.plan.notes],
            "changes": None if self.changes is None else [step.describe() for step in self.changes],
        }

    def render(self) -> str:
        """For a terminal; nft commands that would run are shown as they are."""
        lines = [f"check {check.name}: {check.result}" for check in self.checks]
        lines += [note.render() for note in self.plan.notes]
        if self.changes is None:
            return "\n".join(lines)
        if not self.changes:
            lines.append("nothing would change")
        else:
            lines.append(f"{len(self.changes)} step(s) would change this node:")
        for step in self.changes:
            lines.append(f"  {step.describe()}")
            if isinstance(step, NftTransaction):
                lines += [f"    {line}" for line in step.text.splitlines()]
        return "\n".join(lines)


def dry_run(loaded: LoadedPolicy, facts: Facts | None, directory: StateDirectory) -> Report:
    """Check a policy without changing anything.

    Args:
        loaded: the policy.
        facts: of another host; None means this one, which is compared as well if we are root.
        directory: where the state of this namespace is.

    Raises:
        DatapathError: the policy is wrong, conflicts with this node, or nft or the verifier refuses it.
    """
    if facts is None and os.geteuid() == 0:
        drift = Controller(directory).preview(loaded)
        return Report(drift.plan, _checks(drift.plan, root=True), drift.steps)
    plan = compile_located(loaded, observe_links() if facts is None else facts)
    return Report(plan, _checks(plan, root=os.geteuid() == 0), None)


def _checks(plan: Plan, *, root: bool) -> tuple[Check, ...]:
    return (
        Check("nft", _check_nft(plan)),
        Check("ebpf", _check_ebpf(plan, root=root)),
        Check("live", "compared" if root else "not compared: needs root"),
    )


def _check_nft(plan: Plan) -> str:
    if plan.table is None:
        return "nothing to check: no table is needed"
    sandbox.check_nft(render_table(plan.table))
    return "ok: parsed by nft and taken by this kernel, in an empty namespace"


def _check_ebpf(plan: Plan, *, root: bool) -> str:
    if not plan.attached.networks:
        return "nothing to check: no program is needed"
    if not root:
        return "not checked: loading an eBPF program needs root"
    try:
        verify(plan.attached)
    except DatapathError as error:
        raise DatapathError(f"eBPF: {error}", hint=error.hint) from error
    return "ok: compiled, and accepted by this kernel's verifier"
