# SPDX-License-Identifier: Apache-2.0
"""The virtual machine is what it should be: the kernel that was asked for, with everything the other tests use.

Only collected inside the machine (tests/conftest.py).
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from datapath.kernel.bpf import Capacities, abi, objects
from datapath.kernel.bpf.compiler import compile_and_load
from datapath.kernel.bpf.libbpf import program_info
from datapath.kernel.bpf.source import render
from tests.kernel_features import PROBES, kernel_has
from tests.sources import REPOSITORY

pytestmark = [pytest.mark.vm, pytest.mark.root]

#: Features that not all of the lane's kernels have, with the first version that does.
SINCE = {"tcx": (6, 6)}


def test_the_kernel_is_the_one_that_was_asked_for() -> None:
    assert platform.release() == os.environ["DATAPATH_VM_KERNEL"]


@pytest.mark.parametrize("feature", sorted(PROBES))
def test_the_kernel_has(feature: str) -> None:
    """No skip here: in this machine the feature has to be there, or tests elsewhere would skip without a trace."""
    major, minor = platform.release().split(".")[:2]
    assert kernel_has(feature) == ((int(major), int(minor)) >= SINCE.get(feature, (0, 0)))


@pytest.mark.bpf
def test_the_program_compiles_here_to_what_was_compiled_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests load programs that the host compiled (tools/vm/objects.py): the same instructions."""
    text = render(0x0FFF0000, Capacities(16, 16))
    tags = []
    for folder in (os.environ[objects.ENVIRONMENT], ""):
        monkeypatch.setenv(objects.ENVIRONMENT, folder)
        programs, maps = compile_and_load(text, functions=[abi.PROGRAM_NAME], maps=abi.MAP_NAMES)
        # The kernel's own digest of the instructions, with references to maps left out.
        tags.append(program_info(programs[0]).tag)
        for fd in (*programs, *maps):
            fd.close()
    assert tags[0] == tags[1]


def test_the_repository_is_a_copy_on_write_snapshot() -> None:
    """The host's side of this is checked by the runner (tools/vm/boot.py) after power off."""
    assert f" {REPOSITORY} overlay " in Path("/proc/self/mounts").read_text(encoding="utf-8")
