# SPDX-License-Identifier: Apache-2.0
"""One change while it is carried out: forward until the kernel is as desired, or back as far as it goes.

What may be ours by now is on disk at every moment, whoever refuses or kills what.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from datapath.errors import DatapathError, KernelError
from datapath.kernel.executor import Executor
from datapath.kernel.observer import Sight, observe
from datapath.log import get_logger
from datapath.plan.model import Plan
from datapath.reconcile.actual import Record
from datapath.reconcile.batches import batches
from datapath.reconcile.diff import reconcile
from datapath.reconcile.steps import Step
from datapath.reconcile.sysctls import Caution
from datapath.state import State, StateDirectory

#: Passes until the kernel must be as desired. One does it; a second heals what somebody else changed meanwhile.
_PASSES = 3


class Undertaking:
    """One apply or teardown.

    Args:
        directory: of this namespace, held by the caller.
        record: what is ours before the change.
    """

    def __init__(self, directory: StateDirectory, record: Record) -> None:
        self._directory = directory
        #: Grows until the change is done or undone: what an early pass deletes, the way back may make again.
        self._record = record
        self._log = get_logger()

    def announce(self, state: State, record: Record) -> None:
        """Write down what is about to become ours, beside all that was or may be ours already.

        Raises:
            DatapathError: it cannot be written.
        """
        self._record = self._record.also(record)
        self._directory.save(dataclasses.replace(state, record=self._record))

    def run(self, steps: tuple[Step, ...]) -> None:
        """Carry out steps that were announced.

        Raises:
            DatapathError: the first refusal; nothing after its batch was tried.
        """
        with Executor() as executor:
            for batch in batches(steps):
                if self._log.is_enabled_for(logging.DEBUG):
                    for step in batch:
                        self._log.debug("step_started", step=step.describe())
                executor.run_batch(batch)

    def verify(self, plan: Plan, state: State, sight: Sight, done: tuple[Step, ...]) -> Record:
        """Read the kernel back until it is as desired.

        Args:
            plan: what is desired.
            state: with the record of what is ours once all steps are done.
            sight: of the look that the steps came of. What they were about is read again; all else is as it was
                then, unless somebody has changed it meanwhile, who may as well do so after the last look.
            done: the steps.

        Returns:
            what is ours.

        Raises:
            KernelError: it is not as desired, after several passes.
        """
        for _ in range(_PASSES):
            sight.touched(done)
            changes = reconcile(observe(plan, state, sight), plan, state.record)
            if not changes.steps:
                return changes.after
            self.announce(state, changes.before)
            done = changes.steps
            self.run(done)
            state = dataclasses.replace(state, record=changes.after)
        sight.touched(done)
        changes = reconcile(observe(plan, state, sight), plan, state.record)
        if not changes.steps:
            return changes.after
        raise KernelError(
            "verify",
            f"{len(changes.steps)} difference(s) come back after each change, first: {changes.steps[0].describe()}",
            hint="something else on this node undoes our changes: find it with `ip monitor` and `nft monitor`",
        )

    def roll_back(self, previous: Callable[[], Plan], state: State) -> None:
        """Back to the previous plan, as far as the kernel lets us; the record stays true either way.

        Args:
            previous: compiles it: needed only here, and dear.
            state: before the change.
        """
        record = self._record
        try:
            record = self._go_back(previous(), dataclasses.replace(state, record=record))
        except DatapathError as error:
            self._log.error("rollback_incomplete", error=str(error), hint=error.hint)
        try:
            self._directory.save(dataclasses.replace(state, record=record))
        except DatapathError as error:
            # What is on disk is from before the change, and knows of everything that may be ours.
            self._log.warning("state_not_written", error=str(error), hint=error.hint)

    def _go_back(self, plan: Plan, state: State) -> Record:
        """Whatever can be carried out; what is, or still may be, ours then."""
        changes = reconcile(observe(plan, state), plan, state.record)
        possible = self._record.also(changes.before)
        if possible != self._record:
            # Something of the previous plan was missing before the change, and comes only now.
            self.announce(state, changes.before)
        caution = Caution()
        for batch in batches(changes.steps):
            if any(caution.forbids(step) for step in batch):
                continue
            try:
                with Executor() as executor:
                    executor.run_batch(batch)
            except DatapathError as error:
                self._log.warning("rollback_refused", error=str(error))
                for step in batch:
                    caution.not_done(step)
        left = reconcile(observe(plan, state), plan.settled, state.record)
        if left.steps:
            self._log.error("rollback_incomplete", first=left.steps[0].describe(), left=len(left.steps))
            return possible
        self._log.info("rollback_done", steps=len(changes.steps))
        return left.after
