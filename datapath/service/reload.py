# SPDX-License-Identifier: Apache-2.0
"""The policy files against the policy in force: when they are applied, and what becomes of bad ones.

The files are applied when they change, and at SIGHUP. A policy that a person put in force otherwise (`datapath
apply` of another file, `rollback`) stays in force until then, also over a restart of the daemon: what was
rolled back in an emergency must not come back by itself.
"""

from __future__ import annotations

import json
import time

from datapath.confirmation import undo
from datapath.controller import Controller
from datapath.errors import DatapathError, InputError, ProbeError
from datapath.kernel.guardian import is_overdue
from datapath.log import get_logger
from datapath.observe.stats import ServiceStats
from datapath.policy import LoadedPolicy
from datapath.probing import ProbeUse
from datapath.service.policy_files import PolicyFiles
from datapath.service.restore import restore
from datapath.state import StateDirectory, text_digest

_MEMORY = "daemon.json"
_RETRY_S = 1.0
_RETRY_MAX_S = 30.0
#: A file that is being written is looked at again this often, and read as it is after so long.
_WRITING_S = 1.0
_WRITING_MAX_S = 30.0
#: How long after its deadline an unconfirmed change is ours to undo.
UNDO_GRACE_S = 2.0


class Reloader:
    """Decides what to do about the policy files, and does it."""

    def __init__(
        self, directory: StateDirectory, files: PolicyFiles, controller: Controller, stats: ServiceStats
    ) -> None:
        self._directory = directory
        self._files = files
        self._controller = controller
        self._stats = stats
        self._log = get_logger()
        self._fingerprint = files.fingerprint()
        self._retry_s = _RETRY_S
        self._written_since_s: float | None = None

    def start(self) -> float | None:
        """Put the files in force, unless a person has put something else in force since they were read last.

        Returns:
            as `apply`.

        Raises:
            InputError: the policy is wrong and no other is in force.
            DatapathError: the state directory cannot be read.
        """
        self._complete_undoing()
        state = self._directory.load()
        in_force = state.policy
        try:
            loaded = self._read()
        except InputError as error:
            if not in_force:
                raise
            self._reject(error)
            return None
        if loaded is None:
            return _WRITING_S
        if state.undone and state.undone.policy == _digest(loaded) and in_force != loaded.source.text:
            self._log.warning(
                "policy_was_undone",
                reason=state.undone.reason,
                hint="it stays out of force until the files change, or SIGHUP",
            )
            restore(self._directory.path)
            return None
        if in_force and in_force != loaded.source.text and self._remembered() == _digest(loaded):
            self._log.warning(
                "policy_differs_from_files",
                hint="somebody applied or rolled back to another one: it stays until the files change, or SIGHUP",
            )
            return None
        return self._apply(loaded, is_first=not in_force)

    def files_changed(self) -> bool:
        """Whether a file was saved, added or removed since the last call."""
        before, self._fingerprint = self._fingerprint, self._files.fingerprint()
        return before != self._fingerprint

    def apply(self) -> float | None:
        """Put the files in force.

        Returns:
            seconds until it should be tried again; None where it is done, or only new files can help.
        """
        try:
            loaded = self._read()
        except InputError as error:
            self._reject(error)
            return None
        return _WRITING_S if loaded is None else self._apply(loaded, is_first=False)

    def _read(self) -> LoadedPolicy | None:
        """The files as one moment had them; None while they are being written.

        Raises:
            InputError: they are whole, and wrong.
        """
        self._fingerprint = self._files.fingerprint()
        loaded: LoadedPolicy | None = None
        problem: InputError | None = None
        if is_settled := not self._files.are_being_written():
            try:
                loaded = self._files.load()
            except InputError as error:
                problem = error
            is_settled = self._is_as_read()
        if not is_settled and not self._has_waited_enough():
            return None
        self._written_since_s = None
        if problem is not None:
            raise problem
        return loaded or self._files.load()

    def _is_as_read(self) -> bool:
        return self._fingerprint == self._files.fingerprint() and not self._files.are_being_written()

    def _has_waited_enough(self) -> bool:
        """Somebody may keep a file open for ever."""
        now = time.monotonic()
        if self._written_since_s is None:
            self._written_since_s = now
            self._log.info("policy_being_written", waits_at_most_s=_WRITING_MAX_S)
        return now - self._written_since_s > _WRITING_MAX_S

    def undo_overdue(self) -> bool:
        """Undo a change that nobody confirmed in time and nobody else undid."""
        pending = self._directory.pending()
        if pending is None or not is_overdue(pending, UNDO_GRACE_S):
            return False
        return undo(self._directory, self._controller, pending.token) is not None

    def _complete_undoing(self) -> None:
        """Nobody may have been there when the time of a change was up."""
        try:
            self.undo_overdue()
        except DatapathError as error:
            # It is tried again; the datapath is no worse than before this daemon was started.
            self._log.error("rollback_failed", error=str(error), hint=error.hint)

    def _apply(self, loaded: LoadedPolicy, *, is_first: bool) -> float | None:
        self._stats.policy_rejected = False
        began = time.monotonic()
        try:
            # Where nothing was in force, an undone change would leave a node that serves nobody.
            in_force = self._directory.load().policy
            applied = self._controller.apply(loaded, probes=ProbeUse.JUDGE if in_force else ProbeUse.REPORT)
        except ProbeError as error:
            # Trying it again would be an outage each time.
            self._stats.apply_failed = True
            self._log.error("policy_undone", error=str(error), hint=error.hint, in_force="the one before")
            return None
        except DatapathError as error:
            if is_first and isinstance(error, InputError):
                raise
            self._stats.apply_failed = True
            delay, self._retry_s = self._retry_s, min(2 * self._retry_s, _RETRY_MAX_S)
            self._log.error(
                "policy_not_applied", error=str(error), hint=error.hint, next_attempt_in_s=round(delay, 1)
            )
            return delay
        self._stats.applies.observe(time.monotonic() - began)
        self._stats.applied_at = time.time()
        self._stats.apply_failed = False
        self._retry_s = _RETRY_S
        self._remember(_digest(loaded))
        for note in applied.warnings:
            self._log.warning("probe_failed", error=note.text)
        self._log.info("policy_in_force", generation=applied.generation, steps=len(applied.steps))
        return None

    def _reject(self, error: InputError) -> None:
        self._stats.policy_rejected = True
        self._log.error("policy_rejected", error=str(error), hint=error.hint, in_force="the one before")

    def _remember(self, digest: str) -> None:
        """The policy is in force already: that this cannot be written ends nothing."""
        if self._remembered() == digest:
            return
        try:
            self._directory.write(_MEMORY, json.dumps({"policy_files": digest}) + "\n")
        except DatapathError as error:
            self._log.warning("state_not_written", error=str(error), hint=error.hint)

    def _remembered(self) -> str:
        try:
            document = json.loads(self._directory.file(_MEMORY).read_text(encoding="utf-8"))
            return str(document["policy_files"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""


def _digest(loaded: LoadedPolicy) -> str:
    return text_digest(loaded.source.text)
