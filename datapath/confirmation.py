# SPDX-License-Identifier: Apache-2.0
"""The end of a change on probation: it is confirmed, or it is undone, by whoever is there when its time is up."""

from __future__ import annotations

import dataclasses
import time

from datapath.controller import Applied, Controller
from datapath.errors import DatapathError
from datapath.in_force import parse_in_force
from datapath.kernel.guardian import MISSED, is_overdue, watch_until_deadline
from datapath.log import get_logger
from datapath.probing import failing
from datapath.state import StateDirectory, current_netns, undone_by

#: Until the guardian gives up on a change that cannot be undone: then it is the daemon's, or the next start's.
_RETRIES_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


def confirm(directory: StateDirectory) -> int:
    """Keep the change that waits for confirmation.

    Returns:
        its generation.

    Raises:
        DatapathError: nothing waits, or it is too late.
    """
    with directory.locked():
        state = directory.load()
        if state.pending is None:
            why = f"; the last change was undone: {state.undone.reason}" if state.undone else ""
            raise DatapathError(
                f"nothing waits for confirmation{why}", hint="`datapath history` shows what was in force"
            )
        if is_overdue(state.pending):
            raise DatapathError(
                f"too late, the change goes back: {state.pending.reason or MISSED}",
                hint="`datapath rollback` does it if nobody else does; then apply it again",
            )
        directory.save(dataclasses.replace(state, pending=None))
        return state.generation


def watch(directory: StateDirectory, controller: Controller, token: str) -> Applied | None:
    """The guardian: wait until that change is confirmed, or undo it at its deadline or when a probe fails."""
    reason = watch_until_deadline(directory, token, lambda names: _failing(directory, names))
    if not reason:
        return None
    for delay_s in _RETRIES_S:
        try:
            return undo(directory, controller, token, reason)
        except DatapathError as error:
            # Somebody works on it, or something is in the way: nobody else may be there to try again.
            get_logger().error("rollback_failed", error=str(error), next_attempt_in_s=delay_s)
            time.sleep(delay_s)
    return undo(directory, controller, token, reason)


def undo(
    directory: StateDirectory, controller: Controller, token: str, reason: str = MISSED
) -> Applied | None:
    """Undo the change of that token.

    Returns:
        None where it was confirmed, replaced or undone meanwhile.

    Raises:
        DatapathError: as `Controller.rollback`; who calls this again goes on with it.
    """
    with directory.locked():
        state = directory.load()
        pending = state.pending
        if pending is None or pending.token != token:
            return None
        undone = undone_by(pending, state.generation, state.policy, reason)
        # From here on it is too late to confirm it, and whoever finds it like this completes it.
        pending = dataclasses.replace(pending, reason=pending.reason or reason)
        directory.save(dataclasses.replace(state, pending=pending))
    get_logger().warning("change_undone", reason=pending.reason, back_to=pending.previous)
    applied = controller.rollback(pending.previous)
    with directory.locked():
        state = directory.load()
        # It is still there where nothing was to be done: the change never came in force.
        if state.pending is None or state.pending.token == token:
            state = dataclasses.replace(state, netns=current_netns(), pending=None, undone=undone)
            directory.save(state)
    return applied


def _failing(directory: StateDirectory, names: tuple[str, ...]) -> str:
    state = directory.load()
    if not state.policy:
        return ""
    return failing(parse_in_force(state), state.ids, names)
