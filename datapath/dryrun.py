# SPDX-License-Identifier: Apache-2.0
"""`nft-dry-run`: compile, let the real parsers and the kernel check it, and say what would change."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from datapath.controller import Controller, compile_located
from datapath.errors import DatapathError, KernelError
from datapath.facts import Facts
from datapath.kernel import sandbox
from datapath.kernel.flowtables import FLOWTABLE_USE
from datapath.kernel.ingress import verify
from datapath.kernel.observer import observe_links
from datapath.plan.model import Plan
from datapath.plan.render import plan_digest, render_table
from datapath.policy import LoadedPolicy
from datapath.reconcile.present import carried_table, without_flowtables
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
        # The preview has put the program through the verifier already, if it would have to be loaded.
        checks = (_check_nft(drift.plan), _checked_ebpf(drift.plan), Check("live", "compared"))
        return Report(drift.plan, checks, drift.steps)
    plan = compile_located(loaded, observe_links() if facts is None else facts)
    why = "needs root" if facts is None else "the facts are those of another host"
    checks = (_check_nft(plan), _check_ebpf(plan), Check("live", f"not compared: {why}"))
    return Report(plan, checks, None)


def _check_nft(plan: Plan) -> Check:
    if plan.table is None:
        return Check("nft", "nothing to check: no table is needed")
    # There is no device, and perhaps no flowtable, either.
    table, lacking = carried_table(plan.table, ()) or plan.table, ""
    if table.flowtables:
        try:
            sandbox.check_nft(FLOWTABLE_USE)
        except KernelError:
            table, lacking = without_flowtables(table), ", but for the flowtable: this kernel has none"
    sandbox.check_nft(render_table(table))
    return Check("nft", f"ok: parsed by nft and taken by this kernel, in an empty namespace{lacking}")


def _check_ebpf(plan: Plan) -> Check:
    if plan.attached.networks:
        if os.geteuid() != 0:
            return Check("ebpf", "not checked: loading an eBPF program needs root")
        try:
            verify(plan.attached)
        except DatapathError as error:
            raise DatapathError(f"eBPF: {error}", hint=error.hint) from error
    return _checked_ebpf(plan)


def _checked_ebpf(plan: Plan) -> Check:
    if not plan.attached.networks:
        return Check("ebpf", "nothing to check: no program is needed")
    return Check("ebpf", "ok: compiled, and accepted by this kernel's verifier")
