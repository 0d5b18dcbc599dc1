# SPDX-License-Identifier: Apache-2.0
"""Markers that decide where a test runs, and skips that cannot hide a failure."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from functools import partial
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from datapath.kernel.bpf import objects
from tests.kernel_features import PROBES, SKIP_REASON_PREFIX, kernel_has
from tests.sampling import FULL, is_for_another_kernel

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from _pytest.config import Config
    from _pytest.nodes import Item
    from _pytest.reports import CollectReport, TestReport

_STRICT = os.environ.get("DATAPATH_CI") == "1"
_IN_VM = "DATAPATH_VM_KERNEL" in os.environ

# The tests start Python a thousand times. Where an image forbids compiled files, each start compiles all of ours again,
# which is most of its time, and in an emulated machine most of the run.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Hypothesis gives an example 200 ms by itself: no test here says how long anything takes.
settings.register_profile("datapath", deadline=None)
settings.load_profile("datapath")


def pytest_configure(config: Config) -> None:
    """Let each program be compiled once in a run, not once in each of the hundreds of processes that load it.

    An entry is found by everything that the compiler is given; that it is what comes out of it shows
    tests/bpf/test_objects.py. `make test-full` compiles every time.
    """
    if FULL or objects.ENVIRONMENT in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="datapath-bpf-")
    # The workers of pytest-xdist, and what the tests start, inherit it.
    os.environ[objects.ENVIRONMENT] = folder
    config.add_cleanup(partial(shutil.rmtree, folder, ignore_errors=True))


def pytest_ignore_collect(collection_path: os.PathLike[str], config: Config) -> bool | None:
    """tests/vm asks what kernel it runs on: it has a right answer only inside a virtual machine."""
    vm_tests = config.rootpath / "tests" / "vm"
    return True if os.fspath(collection_path) == os.fspath(vm_tests) and not _IN_VM else None


def pytest_collection_modifyitems(config: Config, items: list[Item]) -> None:
    """Refuse a feature that nobody can probe, before any test runs; leave to another kernel what is for that one."""
    for item in items:
        for feature in _features(item):
            if feature not in PROBES:
                message = (
                    f"{item.nodeid}: no probe for kernel feature {feature!r} in tests/kernel_features.py"
                )
                raise pytest.UsageError(message)
    if elsewhere := [item for item in items if is_for_another_kernel(item)]:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if item not in elsewhere]


def pytest_runtest_setup(item: Item) -> None:
    """Skip what this machine cannot run, with a reason that can be checked."""
    if item.get_closest_marker("root") is not None and os.geteuid() != 0:
        pytest.skip("needs root")
    for feature in _features(item):
        if not kernel_has(feature):
            pytest.skip(SKIP_REASON_PREFIX + feature)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, TestReport, TestReport]:
    """With DATAPATH_CI=1, turn a skip that the kernel does not confirm into a failure."""
    report = yield
    if _STRICT and report.skipped and not hasattr(report, "wasxfail"):
        _refuse_unconfirmed_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, CollectReport, CollectReport]:
    """The same for modules that skip themselves while they are imported."""
    report = yield
    if _STRICT and report.skipped:
        _refuse_unconfirmed_skip(report)
    return report


def _features(item: Item) -> Iterator[str]:
    for marker in item.iter_markers("kernel_feature"):
        yield from marker.args


def _refuse_unconfirmed_skip(report: TestReport | CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    feature = reason.removeprefix(SKIP_REASON_PREFIX)
    if reason.startswith(SKIP_REASON_PREFIX) and feature in PROBES and not kernel_has(feature):
        return
    report.outcome = "failed"
    report.longrepr = (
        f"DATAPATH_CI=1 allows no skip that the kernel does not confirm, but this was skipped: {reason}"
    )
