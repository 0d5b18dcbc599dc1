# SPDX-License-Identifier: Apache-2.0
"""The state directory: what only memory can tell, written so that a crash or power loss never halves it.

Everything that the kernel itself can tell is read from the kernel. Here are the old values of sysctls,
the devices and qdiscs that we made, the last policy, and a copy of the ids for the case that somebody
flushed our table.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datapath.errors import BusyError, DatapathError, InputError
from datapath.facts import IdFacts
from datapath.points import reached
from datapath.reconcile.actual import Record, Saved

FORMAT = 1
DEFAULT_DIRECTORY = Path("/run/datapath")
_STATE = "state.json"
_LOCK = "lock"
DAEMON_LOCK = "daemon.lock"
LOCK_WAIT_S = 10.0
_LOCK_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Pending:
    """A change that waits for its confirmation.

    Attributes:
        token: names it, so that a late guardian does not undo a later change.
        previous: generation to go back to; 0 for nothing in force.
        deadline_s: on the boot clock (CLOCK_BOOTTIME).
    """

    token: str
    previous: int
    deadline_s: float


@dataclass(frozen=True, slots=True)
class State:
    """What was last written.

    Attributes:
        ebpf_refused: why the policy in force runs without eBPF, empty where it does not.
        netns: inode of the network namespace that this state is about; 0 for a new directory.
        generation: counts successful applies that changed something; without a policy, it is the last one
            that was good in an earlier boot.
        policy: text of the policy in force, empty where none is.
        policy_name: file name for messages about that text.
    """

    record: Record = field(default_factory=Record)
    ids: tuple[IdFacts, ...] = ()
    fwmark_mask: int = 0
    generation: int = 0
    policy: str = ""
    policy_name: str = ""
    ebpf_refused: str = ""
    netns: int = 0
    pending: Pending | None = None


def current_netns() -> int:
    """Inode of the network namespace of this process."""
    return Path("/proc/self/ns/net").stat().st_ino


def boot_id() -> str:
    """Changes with every boot: sysctls and devices of an earlier one are gone."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class StateDirectory:
    """One directory for one network namespace."""

    def __init__(self, path: Path = DEFAULT_DIRECTORY) -> None:
        self.path = path

    @contextmanager
    def locked(self, *, wait_s: float = LOCK_WAIT_S, name: str = _LOCK) -> Iterator[None]:
        """Hold the directory: one writer at a time.

        Args:
            wait_s: for another process, such as a daemon that heals something at this moment.
            name: of the lock; `DAEMON_LOCK` is held by a daemon for all of its life.

        Raises:
            BusyError: somebody else holds it.
            DatapathError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o755)
            descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DatapathError(
                f"state directory {self.path}: {error.strerror}", hint="choose another with --state-dir"
            ) from error
        try:
            if not _lock_within(descriptor, wait_s):
                raise BusyError(
                    f"another datapath process works on {self.path}", hint="wait until it has finished"
                )
            yield
        finally:
            os.close(descriptor)

    def file(self, name: str) -> Path:
        return self.path / name

    def load(self) -> State:
        """The last state; a new one where there is none or it is of an earlier boot.

        Raises:
            InputError: the directory belongs to another namespace or to a newer version, or is damaged.
        """
        path = self.path / _STATE
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return State()
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read: {error}",
                hint="restore it, or remove it: ids are read from the kernel, but old sysctl values are lost",
            ) from error
        return _decode(document, path)

    def save(self, state: State) -> None:
        """Write the state: whole, or not at all.

        Raises:
            DatapathError: it cannot be written (full, read-only); the old one is still there.
        """
        self.write(_STATE, json.dumps(_encode(state), indent=1, sort_keys=True) + "\n")

    def write(self, name: str, text: str) -> Path:
        """Write a file atomically and durably."""
        path = self.path / name
        temporary = path.with_suffix(path.suffix + ".new")
        reached(f"write {name}")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            reached(f"rename {name} into place")
            temporary.rename(path)
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise DatapathError(
                f"{path}: {error.strerror}",
                hint="nothing was changed by this write; make room, or use --state-dir",
            ) from error
        return path

    def clear(self) -> None:
        """Forget everything: after a complete teardown."""
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (_LOCK, DAEMON_LOCK):
                path.unlink()


def _lock_within(descriptor: int, seconds: float) -> bool:
    """Polled, because flock(2) itself knows no timeout."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_POLL_S)
        else:
            return True


def _encode(state: State) -> dict[str, Any]:
    record = state.record
    return {
        "format": FORMAT,
        "boot": boot_id(),
        "netns": state.netns,
        "generation": state.generation,
        "fwmark_mask": state.fwmark_mask,
        "ids": [ids.model_dump() for ids in state.ids],
        "sysctls": {key: [saved.original, saved.ours] for key, saved in sorted(record.sysctls.items())},
        "links": sorted(record.links),
        "clsact": sorted(record.clsact),
        "ebpf_refused": state.ebpf_refused,
        "pending": None if state.pending is None else dataclasses.asdict(state.pending),
        "policy": state.policy,
        "policy_name": state.policy_name,
    }


def _decode(document: Any, path: Path) -> State:
    try:
        if document["format"] > FORMAT:
            raise InputError(
                f"{path}: written by a newer version of datapath (format {document['format']})",
                hint="upgrade, or run `datapath teardown` with that version",
            )
        if document["boot"] != boot_id():
            # Nothing of that boot exists any more, but the operator's ids should not move, and history goes on.
            pending = document["pending"]
            return State(
                ids=tuple(IdFacts(**ids) for ids in document["ids"]),
                fwmark_mask=document["fwmark_mask"],
                generation=document["generation"] if pending is None else pending["previous"],
            )
        netns = current_netns()
        if document["netns"] != netns:
            raise InputError(
                f"{path}: belongs to another network namespace",
                hint="use a --state-dir of its own for each; remove the file if that namespace is gone",
            )
        return State(
            record=Record(
                {key: Saved(*values) for key, values in document["sysctls"].items()},
                frozenset(document["links"]),
                frozenset(document["clsact"]),
            ),
            ids=tuple(IdFacts(**ids) for ids in document["ids"]),
            fwmark_mask=document["fwmark_mask"],
            generation=document["generation"],
            policy=document["policy"],
            policy_name=document["policy_name"],
            ebpf_refused=document["ebpf_refused"],
            netns=netns,
            pending=None if document["pending"] is None else Pending(**document["pending"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: damaged: {error}",
            hint="restore it, or remove it: ids are read from the kernel, but old sysctl values are lost",
        ) from error
