# SPDX-License-Identifier: Apache-2.0
"""The state directory: what only memory can tell, written so that a crash or power loss never halves it.

Everything that the kernel itself can tell is read from the kernel. Here are the old values of sysctls,
the devices and qdiscs that we made, the last policy, and a copy of the ids for the case that somebody
flushed our table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Annotated, Any

import pydantic

from datapath.errors import BusyError, DatapathError, InputError
from datapath.facts import IdFacts, IpNetwork
from datapath.plan.rtnl import Slave
from datapath.points import reached
from datapath.reconcile.actual import Record, Saved
from datapath.sealed import seal, unseal

FORMAT = 1
DEFAULT_DIRECTORY = Path("/run/datapath")
_STATE = "state.json"
_LOCK = "lock"
_ID_FIELDS = tuple(field.name for field in dataclasses.fields(IdFacts))
DAEMON_LOCK = "daemon.lock"
LOCK_WAIT_S = 10.0
_LOCK_POLL_S = 0.02
#: What we may ever have changed: a damaged key must not become a path to anything else.
_SYSCTL = re.compile(r"net/ipv[46](?:/(?!\.\.?(?:/|\Z))[^/\0]+)+\Z")
_LOSS = "ids are read from the kernel, but old sysctl values are lost"


@dataclass(frozen=True, slots=True)
class Pending:
    """A change that waits for its confirmation.

    Attributes:
        token: names it, so that a late guardian does not undo a later change.
        previous: generation to go back to; 0 for nothing in force.
        deadline_s: on the boot clock (CLOCK_BOOTTIME).
        watched: names of the probes that worked when the change was in force; they are repeated until then.
        reason: why it is being undone, empty while it may still be confirmed.
    """

    token: str
    previous: int
    deadline_s: float
    watched: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Undone:
    """A change that undid itself. It must not come back by itself either.

    Attributes:
        policy: SHA-256 of its text.
        reason: why.
    """

    policy: str
    reason: str


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
        undone: the last change that undid itself, until a policy is applied.
        gateways_down: by network, as the daemon found out last.
        egress_sets: what external programs put into the sets of `egress`, by the name of the entry; kept while the
            policy does not name it, so that going back to one that does finds it.
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
    undone: Undone | None = None
    gateways_down: Mapping[str, tuple[IPv4Address | IPv6Address, ...]] = field(default_factory=dict)
    egress_sets: Mapping[str, tuple[IpNetwork, ...]] = field(default_factory=dict)


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
        #: What a file with that digest says, in that namespace: a daemon reads the same one again and again.
        self._known: tuple[bytes, int, State] | None = None
        self._nothing_pending: tuple[int, ...] = ()

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
            # Only to read: a file system that has become read-only must not keep anybody from being healed.
            descriptor = os.open(self.path / name, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DatapathError(
                f"state directory {self.path}: {error.strerror}", hint=_remedy(error)
            ) from error
        try:
            if not _lock_within(descriptor, wait_s):
                raise BusyError(
                    f"another datapath process works on {self.path}", hint="wait until it has finished"
                )
            yield
        finally:
            os.close(descriptor)

    def has_daemon(self) -> bool:
        """Whether a daemon serves this directory; this process may be it."""
        try:
            with self.locked(wait_s=0, name=DAEMON_LOCK):
                return False
        except BusyError:
            return True
        except DatapathError:
            return False

    def file(self, name: str) -> Path:
        return self.path / name

    def load(self) -> State:
        """The last state; a new one where there is none or it is of an earlier boot.

        Raises:
            InputError: the directory belongs to another namespace or to a newer version, or is damaged.
        """
        path, found = self.path / _STATE, self._fingerprint()
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return State()
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}", hint=_remedy(error)) from error
        digest, netns = hashlib.sha256(text).digest(), current_netns()
        if self._known is None or self._known[:2] != (digest, netns):
            state = _decode(unseal(text, path, hint=f"restore it, or remove it: {_LOSS}"), path)
            self._known = (digest, netns, state)
        state = self._known[2]
        # Taken before it was read: a file that came between the two has another.
        self._nothing_pending = found if state.pending is None else ()
        return state

    def pending(self) -> Pending | None:
        """The change that waits for its confirmation. A file that said before that none does is not read again.

        Raises:
            InputError: as `load`.
        """
        found = self._fingerprint()
        if found and found == self._nothing_pending:
            return None
        return self.load().pending

    def _fingerprint(self) -> tuple[int, ...]:
        """Of the file of the state, which is never changed but replaced; empty where it cannot be seen."""
        try:
            status = (self.path / _STATE).stat()
        except OSError:
            return ()
        return status.st_ino, status.st_mtime_ns, status.st_size, status.st_ctime_ns

    def forget(self) -> None:
        """Free what is kept of the file."""
        self._known = None

    def save(self, state: State) -> None:
        """Write the state: whole, or not at all.

        Raises:
            DatapathError: it cannot be written (full, read-only); the old one is still there.
        """
        text = seal(_encode(state))
        self.write(_STATE, text)
        # What was just written need not be read.
        self._known = (hashlib.sha256(text.encode()).digest(), state.netns, state)

    def write(self, name: str, text: str) -> Path:
        """Write a file atomically and durably, and its folder if there is none.

        Raises:
            DatapathError: it cannot be written (full, read-only); what was there before still is.
        """
        path = self.path / name
        temporary = path.with_suffix(path.suffix + ".new")
        reached(f"write {name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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
            # Half a file would go on taking the room that is missing.
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise DatapathError(
                f"{path}: cannot be written: {error.strerror}", hint=_remedy(error)
            ) from error
        return path

    def require_writable(self) -> None:
        """Before something is removed that the directory would still speak of.

        Raises:
            DatapathError: files in it cannot be removed.
        """
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise DatapathError(
                f"state directory {self.path}: cannot be written",
                hint="nothing was changed: make it writable",
            )

    def clear(self) -> None:
        """Forget everything: after a complete teardown.

        Raises:
            DatapathError: a file cannot be removed.
        """
        try:
            # First of all what says that a policy is in force.
            (self.path / _STATE).unlink(missing_ok=True)
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name not in (_LOCK, DAEMON_LOCK):
                    path.unlink()
        except OSError as error:
            raise DatapathError(
                f"{error.filename or self.path}: cannot be removed: {error.strerror}",
                hint="nothing is in force any more; remove it by hand",
            ) from error


def _remedy(error: OSError) -> str:
    """What to do about a file of ours that the system refuses."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "what is in force stays; make room on that file system"
    if error.errno == errno.EROFS:
        return "what is in force stays; mount that file system writable"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "run it as root"
    return "what is in force stays; choose another directory with --state-dir if this one cannot be used"


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
        "ids": [{name: getattr(ids, name) for name in _ID_FIELDS} for ids in state.ids],
        "sysctls": {key: [saved.original, saved.ours] for key, saved in sorted(record.sysctls.items())},
        "links": sorted(record.links),
        "clsact": sorted(record.clsact),
        "slaves": [[slave.device, slave.vrf] for slave in sorted(record.slaves)],
        "ebpf_refused": state.ebpf_refused,
        "pending": None if state.pending is None else dataclasses.asdict(state.pending),
        "undone": None if state.undone is None else dataclasses.asdict(state.undone),
        "gateways_down": {name: list(map(str, down)) for name, down in sorted(state.gateways_down.items())},
        "egress_sets": {name: [str(p) for p in found] for name, found in sorted(state.egress_sets.items())},
        "policy": state.policy,
        "policy_name": state.policy_name,
    }


def _sysctl_key(key: str) -> str:
    if _SYSCTL.match(key) is None:
        raise ValueError(f"{key!r} is no sysctl of ours")
    return key


class _Document(pydantic.BaseModel):
    """The file, as this version writes it."""

    boot: str
    netns: int
    generation: Annotated[int, pydantic.Field(ge=0)]
    fwmark_mask: Annotated[int, pydantic.Field(ge=0, le=0xFFFFFFFF)]
    ids: tuple[IdFacts, ...]
    sysctls: dict[Annotated[str, pydantic.AfterValidator(_sysctl_key)], tuple[str, str]]
    links: frozenset[str]
    clsact: frozenset[str]
    ebpf_refused: str
    pending: Pending | None
    policy: str
    policy_name: str
    undone: Undone | None = None
    slaves: tuple[tuple[str, str], ...] = ()
    gateways_down: dict[str, tuple[IPv4Address | IPv6Address, ...]] = {}
    egress_sets: dict[str, tuple[IpNetwork, ...]] = {}


def _decode(document: dict[str, Any], path: Path) -> State:
    version = document.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise InputError(
            f"{path}: written by a newer version of datapath (format {version})",
            hint="upgrade, or run `datapath teardown` with that version",
        )
    try:
        read = _Document.model_validate(document)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{path}: damaged: {where}: {first['msg']}", hint=f"restore it, or remove it: {_LOSS}"
        ) from error
    if read.boot != boot_id():
        # Nothing of that boot exists any more, but the operator's ids should not move, and history goes on.
        generation = read.generation if read.pending is None else read.pending.previous
        return State(
            ids=read.ids,
            fwmark_mask=read.fwmark_mask,
            generation=generation,
            undone=_undone(read),
            egress_sets=read.egress_sets,
        )
    netns = current_netns()
    if read.netns != netns:
        raise InputError(
            f"{path}: belongs to another network namespace",
            hint="use a --state-dir of its own for each; remove the file if that namespace is gone",
        )
    return State(
        record=Record(
            {key: Saved(*values) for key, values in read.sysctls.items()},
            read.links,
            read.clsact,
            frozenset(Slave(device, vrf) for device, vrf in read.slaves),
        ),
        ids=read.ids,
        fwmark_mask=read.fwmark_mask,
        generation=read.generation,
        policy=read.policy,
        policy_name=read.policy_name,
        ebpf_refused=read.ebpf_refused,
        netns=netns,
        pending=read.pending,
        undone=read.undone,
        gateways_down=read.gateways_down,
        egress_sets=read.egress_sets,
    )


def _undone(read: _Document) -> Undone | None:
    """Of an earlier boot: a change that was on probation when the machine went down was not good."""
    reason = "the machine went down before it was confirmed"
    return undone_by(read.pending, read.generation, read.policy, reason) or read.undone


def undone_by(pending: Pending | None, generation: int, policy: str, reason: str) -> Undone | None:
    """What goes back when a pending change does; None where its policy never came in force."""
    # The number goes up when the policy is in force: until then, the text is still the one before.
    if pending is None or generation == pending.previous or not policy:
        return None
    return Undone(text_digest(policy), pending.reason or reason)


def text_digest(text: str) -> str:
    """Names a policy text."""
    return hashlib.sha256(text.encode()).hexdigest()
