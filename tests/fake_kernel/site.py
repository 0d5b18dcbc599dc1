# SPDX-License-Identifier: Apache-2.0
"""A node on the fake kernel with its state directory, and faults at the points that the engine names."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from datapath import points, undertaking
from datapath.controller import Controller
from datapath.errors import DatapathError, KernelError
from datapath.observe.stats import ServiceStats
from datapath.plan.model import Plan
from datapath.plan.tc import Hook
from datapath.reconcile.actual import Actual, ActualLink
from datapath.reconcile.steps import Step
from datapath.service.healer import Healer, Look
from datapath.service.policy_files import PolicyFiles
from datapath.service.reload import Reloader
from datapath.state import State, StateDirectory
from tests.fake_kernel.kernel import PER_DEVICE, FakeKernel
from tests.fake_kernel.policies import policy, text_of

#: What happens at a point, by its number counted from 0.
Faults = Mapping[int, Callable[[str], Exception | BaseException]]


class Killed(BaseException):
    """The process is gone: nobody handles this."""


class Site:
    """A node and its state directory, both as often from the same moment as needed."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch = folder, patch
        self._count = 0
        self._kernel = FakeKernel([], {})
        self._files: dict[str, str] = {}

    def begin(self, policy_name: str, backend: str, hook: Hook = Hook.TCX) -> None:
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
        self.directory = StateDirectory(self.folder)
        self.controller = Controller(self.directory)

    def again_meddled(self) -> None:
        """The same; and somebody deletes a rule of ours just before we read back for the first time."""
        self.again()
        kernel, is_done = self.kernel, False

        def observe(desired: Plan, state: State, sight: object = None) -> Actual:
            nonlocal is_done
            if not is_done and kernel.rules.ordered:
                kernel.rules.ordered.pop()
            is_done = True
            return kernel.observe(desired, state, sight)

        self._patch.setattr(undertaking, "observe", observe)

    def apply(self, policy_name: str, backend: str) -> tuple[Step, ...]:
        """Make a policy the one in force; `none` tears down."""
        if policy_name == "none":
            return self.controller.teardown()
        return self.controller.apply(policy(policy_name, backend)).steps

    def look(self) -> Look:
        """What a daemon does first about the policy in force."""
        return Healer(self.directory).look()

    def start_daemon(self, policy_name: str, backend: str) -> None:
        """What a daemon does that starts with this policy file, up to its first look."""
        path = self.folder.with_suffix(".yaml")
        path.write_text(text_of(policy_name, backend))
        controller = Controller(self.directory, wait_for_devices=True)
        Reloader(self.directory, PolicyFiles(path, None), controller, ServiceStats()).start()
        look = self.look()
        assert not look.done
        assert not look.failed

    def files(self) -> dict[str, str]:
        """What is in the state directory."""
        paths = self.folder.rglob("*") if self.folder.is_dir() else ()
        return {str(path.relative_to(self.folder)): path.read_text() for path in paths if path.is_file()}

    def differences(self, expected: dict[str, Any]) -> list[str]:
        """What is not as in that snapshot, in words.

        A clsact qdisc of ours stays while a network is on its device, needed or not (design: order and ownership).
        """
        got = self.kernel.snapshot()
        if expected["table"] is not None or expected["attached"]:
            kept = got["clsact"] & self.directory.load().record.clsact
            got["clsact"] -= kept - expected["clsact"]
        return differences(got, expected)


def points_of(operation: Callable[[], object]) -> list[str]:
    """The names of all points that an operation passes."""
    names: list[str] = []
    with points.listening(names.append):
        operation()
    return names


def refusal(code: int) -> Callable[[str], KernelError]:
    """The kernel says no."""
    return lambda name: KernelError(name, f"{os.strerror(code)} ({errno.errorcode[code]})", errno=code)


def attempt(operation: Callable[[], object], faults: Faults) -> DatapathError | Killed | None:
    """The error that an operation ended with, None where it was completed."""
    passed = -1

    def listener(name: str) -> None:
        nonlocal passed
        passed += 1
        if passed in faults:
            raise faults[passed](name)

    with points.listening(listener):
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
