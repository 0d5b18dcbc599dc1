# SPDX-License-Identifier: Apache-2.0
"""The probes of one change: tried before it, judged after it.

What failed before the change says nothing about the change, and the change may be its repair: it is reported and does
not count. What could not be tried before, because its network is new, counts.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable

from datapath.compiler.probes import compile_probes, with_before
from datapath.errors import ProbeError
from datapath.facts import IdFacts
from datapath.kernel.probe import run_probes
from datapath.plan.model import NetworkIds, Note, NoteLevel
from datapath.plan.probe import ProbeKind, ProbeTask
from datapath.policy import LoadedPolicy, Policy


class ProbeUse(enum.StrEnum):
    """What becomes of a probe that fails.

    JUDGE undoes the change. REPORT only says so: there is nothing to go back to, or nothing was changed. SKIP tries
    none: going back to what was good before must not depend on them.
    """

    JUDGE = "judge"
    REPORT = "report"
    SKIP = "skip"


class Probing:
    """The probes of one change.

    Args:
        loaded: the new policy.
        waiting: devices that are missing or down; probes of their networks are left out.

    Attributes:
        warnings: about probes that failed and did not count.
    """

    def __init__(self, loaded: LoadedPolicy, use: ProbeUse, waiting: Collection[str] = ()) -> None:
        self._loaded = loaded
        self._use = use
        self._waiting = waiting
        self._tried: frozenset[str] = frozenset()
        self._failed_before: dict[str, str] = {}
        self.warnings: tuple[Note, ...] = ()

    def try_before(self, previous: Callable[[], Policy | None], ids: Iterable[NetworkIds | IdFacts]) -> None:
        """Try what can be tried in the state that the change will replace.

        Args:
            previous: reads the policy in force; None where there is none. Not asked where there are no probes.
            ids: in force.
        """
        if self._use is not ProbeUse.JUDGE:
            return
        tasks = self._tasks(ids)
        if not tasks:
            return
        tasks = with_before(tasks, previous())
        self._tried = frozenset(task.name for task in tasks)
        self._failed_before = run_probes(tasks)

    def judge(self, ids: Iterable[NetworkIds | IdFacts]) -> tuple[str, ...]:
        """Try all of them in the new state.

        Args:
            ids: of the new policy.

        Returns:
            names of those that work.

        Raises:
            ProbeError: one fails that did not fail before.
        """
        if self._use is ProbeUse.SKIP:
            return ()
        tasks = self._tasks(ids)
        failed = run_probes(tasks)
        counted = [task for task in tasks if task.name in failed and task.name not in self._failed_before]
        if self._use is ProbeUse.JUDGE and counted:
            raise self._error(counted, failed)
        self.warnings = tuple(self._warning(task, failed[task.name]) for task in tasks if task.name in failed)
        return tuple(task.name for task in tasks if task.name not in failed)

    def _tasks(self, ids: Iterable[NetworkIds | IdFacts]) -> tuple[ProbeTask, ...]:
        tasks = compile_probes(self._loaded.policy, {item.name: item.fwmark for item in ids})
        return tuple(task for task in tasks if task.device not in self._waiting)

    def _where(self, task: ProbeTask) -> str:
        source = self._loaded.source
        return f"{source.filename}:{source.line_of(('probes', task.position))}"

    def _warning(self, task: ProbeTask, seen: str) -> Note:
        before = ", as before the change" if task.name in self._failed_before else ""
        text = f"probe {task.name} fails{before}: {seen}; it does not count"
        return Note(NoteLevel.WARNING, f"probes[{task.position}]", text)

    def _error(self, tasks: list[ProbeTask], failed: dict[str, str]) -> ProbeError:
        lines = [
            f"{self._where(task)}: probe {task.name} fails after the change: {failed[task.name]}; "
            f"{'it worked before' if task.name in self._tried else 'its network is new with the change'}"
            for task in tasks
        ]
        hint = "the change was undone; "
        if any(task.kind is ProbeKind.GATEWAY for task in tasks):
            hint += "check the gateway's address and the device or VLAN, "
        if any(task.kind is not ProbeKind.GATEWAY for task in tasks):
            hint += "check routes and `reverse_path` on the way there and back, "
        return ProbeError("\n".join(lines), hint=hint + "or remove the probe if it asks for too much")


def failing(loaded: LoadedPolicy, ids: Iterable[IdFacts], names: Collection[str]) -> str:
    """Try those probes of the policy in force again.

    Returns:
        the first that fails and what was seen; empty where all of them work.
    """
    tasks = compile_probes(loaded.policy, {item.name: item.fwmark for item in ids})
    failed = run_probes(task for task in tasks if task.name in names)
    return next((f"probe {name} fails: {seen}" for name, seen in failed.items()), "")
