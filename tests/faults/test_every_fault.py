# SPDX-License-Identifier: Apache-2.0
"""Every point of every kind of change: refused with every error, refused twice, killed. On the fake kernel.

The fake refuses what the kernel refuses (tests/faults/test_fake_kernel.py), and is quick enough to leave nothing
out. tests/faults/test_refusals.py and test_crash.py do the same on the running kernel, with samples.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from datapath import controller as controller_module
from datapath import points
from datapath.controller import Controller
from datapath.errors import DatapathError, KernelError
from datapath.plan.tc import Hook
from datapath.policy import parse_policy
from datapath.reconcile.actual import ActualLink
from datapath.reconcile.steps import Step
from datapath.reconcile.sysctls import ALL
from datapath.state import StateDirectory
from tests.fake_kernel.kernel import PER_DEVICE, FakeKernel
from tests.fake_kernel.policies import policy

pytestmark = pytest.mark.slow

#: What the kernel plausibly says to any netlink, bpf or /proc operation.
ERRNOS = (
    errno.ENOMEM,
    errno.EBUSY,
    errno.EEXIST,
    errno.ENOENT,
    errno.EPERM,
    errno.ENOBUFS,
    errno.ETIMEDOUT,
)
#: Kinds of change: from, to. Teardown is the way to `none`.
CHANGES = (
    ("none", "two"),
    ("one", "two"),
    ("two", "one"),
    ("two", "vlan"),
    ("vlan", "two"),
    ("vlan", "other vlan"),
    ("two", "gateway"),
    ("two", "vips"),
    ("two", "one family"),
    ("two", "no gateway"),
    ("two", "mode"),
    ("two", "track"),
    ("two", "mark"),
    ("two", "table"),
    ("two", "arp"),
    ("two", "mask"),
    ("two", "priority"),
)
#: These pin an id. One that the policy before does not pin stays what it is, once half of the new one is there.
PINNED = ("mark", "table")
#: What looks at packets, and how the kernel takes the program.
EBPF, EBPF_CLSACT, NFT = ("ebpf", Hook.TCX), ("ebpf", Hook.CLSACT), ("nft", Hook.TCX)
#: Policy and backend before, policy and backend after, hook.
CASES = [
    pytest.param((old, backend), (new, backend), hook, id=f"{old}-{new}-{backend}-{hook}")
    for backend, hook in (EBPF, NFT, EBPF_CLSACT)
    for old, new in (CHANGES if hook is Hook.TCX else CHANGES[:5])
] + [
    pytest.param(("two", old), ("two", new), hook, id=f"two-two-{old}-{new}-{hook}")
    for old, new in (("ebpf", "nft"), ("nft", "ebpf"))
    for hook in Hook
]
Policy = tuple[str, str]
#: Not refused a second time: a disk that fails together with the kernel, and the one sysctl that all others hang on.
SPARED = (".json", ALL)


class Killed(BaseException):
    """The process is gone: nobody handles this."""


class Site:
    """A node and its state directory, both as often from the same moment as needed."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, patch
        self._count = 0
        self._kernel = FakeKernel([], {})
        self._files: dict[str, str] = {}

    def begin(self, policy_name: str, backend: str, hook: Hook) -> None:
        """A new node with one policy in force, or none."""
        devices = ("all", "default", "lo", "eth1", "eth2", "eth3")
        sysctls = {f"net/ipv4/conf/{device}/{key}": "0" for device in devices for key in PER_DEVICE}
        for device, value in (("all", "1"), ("default", "1"), ("eth1", "2")):
            sysctls[f"net/ipv4/conf/{device}/rp_filter"] = value
        self._kernel = FakeKernel([ActualLink(name, up=True) for name in devices[2:]], sysctls, hook=hook)
        self._files = {}
        self.again()
        if policy_name != "none":
            self.apply(policy_name, backend)
        self._kernel, self._files = self.kernel, self.files()
        self.again()

    def again(self) -> None:
        """Back to what `begin` made."""
        self._count += 1
        self.folder = self._folder / str(self._count)
        for name, text in self._files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.kernel = self._kernel.copy()
        self.kernel.serve(self._patch)
        self.controller = Controller(StateDirectory(self.folder))

    def apply(self, policy_name: str, backend: str) -> tuple[Step, ...]:
        """Make a policy the one in force; `none` tears down."""
        if policy_name == "none":
            return self.controller.teardown()
        return self.controller.apply(policy(policy_name, backend)).steps

    def files(self) -> dict[str, str]:
        """What is in the state directory."""
        paths = self.folder.rglob("*") if self.folder.is_dir() else ()
        return {str(path.relative_to(self.folder)): path.read_text() for path in paths if path.is_file()}


def recording(names: list[str], refuse: Callable[[int, str], None]) -> Callable[[str], None]:
    """A listener that notes points, and asks at each whether to go on."""

    def listener(name: str) -> None:
        names.append(name)
        refuse(len(names) - 1, name)

    return listener


def points_of(operation: Callable[[], object]) -> list[str]:
    """The names of all points that an operation passes."""
    names: list[str] = []
    with points.listening(recording(names, lambda _number, _name: None)):
        operation()
    return names


def refused_at(
    numbers: Collection[int], code: int, *, spared: Collection[str] = ()
) -> Callable[[int, str], None]:
    """The kernel says no at these points, counted from 0, unless one of `spared` is in their name."""

    def refuse(number: int, name: str) -> None:
        if number in numbers and not any(words in name for words in spared):
            raise KernelError(name, f"{os.strerror(code)} ({errno.errorcode[code]})", errno=code)

    return refuse


def killed_at(victim: int) -> Callable[[int, str], None]:
    """The process dies at this point."""

    def kill(number: int, name: str) -> None:
        if number == victim:
            raise Killed(name)

    return kill


def attempt(
    operation: Callable[[], object], refuse: Callable[[int, str], None]
) -> DatapathError | Killed | None:
    """The error that an operation ended with, None where it was completed."""
    with points.listening(recording([], refuse)):
        try:
            operation()
        except (DatapathError, Killed) as error:
            return error
    return None


def countless(text: str) -> str:
    """Without the numbers of generations."""
    return re.sub(r"\d{6}", "N", text)


def differences(got: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What of two snapshots differs, in words."""
    found = []
    for part, wanted in expected.items():
        if got[part] == wanted:
            continue
        if isinstance(wanted, dict):
            keys = [key for key in {*wanted, *got[part]} if wanted.get(key) != got[part].get(key)]
            found += [
                f"{part} {key}: {got[part].get(key)} instead of {wanted.get(key)}" for key in sorted(keys)
            ]
        else:
            found.append(f"{part}: {got[part]} instead of {wanted}")
    return found


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # What reaches the disk is tested where it matters; here it would be most of the time. So would be reading
    # the same few policies, and writing a log that nobody reads.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(controller_module, "parse_policy", functools.cache(parse_policy))
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield Site(tmp_path, monkeypatch)
    structlog.configure(**before)


@pytest.mark.parametrize(("old", "new", "hook"), CASES)
def test_refused_once(site: Site, old: Policy, new: Policy, hook: Hook) -> None:
    """Rolled back to exactly the state before, or completed; the error names the point and the reason.

    A teardown is not rolled back: what was put back already is right. It can be repeated.
    """
    site.begin(*old, hook)
    before = site.kernel.snapshot()
    names = points_of(lambda: site.apply(*new))
    after = site.kernel.snapshot()
    refused = 0
    for number, name in enumerate(names):
        for code in ERRNOS:
            where = f"{name}: {errno.errorcode[code]}"
            site.again()
            error = attempt(lambda: site.apply(*new), refused_at({number}, code))
            if error is None:
                assert not differences(site.kernel.snapshot(), after), where
                continue
            refused += 1
            assert countless(name) in countless(str(error)), where
            assert errno.errorcode[code] in str(error), where
            if new[0] != "none":
                assert not differences(site.kernel.snapshot(), before), where
        finish = new if new[0] == "none" else old
        assert new[0] == "none" or not site.apply(*finish), f"{name}: nothing is left to do"
        assert not differences(site.kernel.snapshot(), (after if new[0] == "none" else before)), name
    assert refused > len(names) * len(ERRNOS) // 2
    assert len(names) > 5


@pytest.mark.parametrize(("old", "new", "hook"), CASES)
def test_refused_again_while_going_back(site: Site, old: Policy, new: Policy, hook: Hook) -> None:
    """The way back is refused, too, at each of its points in turn: the next apply of either policy cleans up."""
    site.begin(*old, hook)
    before = site.kernel.snapshot()
    names = points_of(lambda: site.apply(*new))
    after = site.kernel.snapshot()
    for first, name in enumerate(names):
        for second in range(first + 1, first + 1 + len(names), 5):
            site.again()
            numbers = {first, second + first % 5}
            if attempt(lambda: site.apply(*new), refused_at(numbers, errno.ENOMEM, spared=SPARED)) is None:
                continue
            target, expected = (new, after) if second % 2 or new[0] in PINNED else (old, before)
            site.apply(*target)
            assert not differences(site.kernel.snapshot(), expected), f"{name}, then number {second}"


@pytest.mark.parametrize(("old", "new", "hook"), CASES)
def test_killed(site: Site, old: Policy, new: Policy, hook: Hook) -> None:
    """Killed at any point, the next apply of either policy, rollback or teardown leaves exactly its own state."""
    site.begin("none", "nft", hook)
    bare = site.kernel.snapshot()
    site.begin(*old, hook)
    before = site.kernel.snapshot()
    names = points_of(lambda: site.apply(*new))
    after = site.kernel.snapshot()
    for number, name in enumerate(names):
        # Ids that a policy does not pin stay what they are: half of the new policy may be in force already.
        unmoved = (old, before) if new[0] not in PINNED else (new, after)
        for target, expected in ((new, after), unmoved, (("none", ""), bare)):
            site.again()
            assert isinstance(attempt(lambda: site.apply(*new), killed_at(number)), Killed)
            site.apply(*target)
            assert not differences(site.kernel.snapshot(), expected), (
                f"killed before {name}, then {target[0]}"
            )
            drift = site.controller.status()
            assert drift is None or not drift.steps, name
