# SPDX-License-Identifier: Apache-2.0
"""The virtual machine is what it should be: the kernel that was asked for, with everything the other tests use.

Only collected inside the machine (tests/conftest.py).
"""

from __future__ import annotations

import os
import platform
from hashlib import sha256
from pathlib import Path

import pytest

from datapath.kernel.bpf.compiler import compile_and_load
from datapath.kernel.bpf.source import Source
from tests.kernel_features import PROBES, kernel_has
from tests.sources import REPOSITORY

pytestmark = [pytest.mark.vm, pytest.mark.root]


def test_the_kernel_is_the_one_that_was_asked_for() -> None:
    assert platform.release() == os.environ["DATAPATH_VM_KERNEL"]


@pytest.mark.parametrize("feature", sorted(PROBES))
def test_the_kernel_has(feature: str) -> None:
    """No skip here: in this machine the feature has to be there, or tests elsewhere would skip without a trace."""
    assert kernel_has(feature)


@pytest.mark.bpf
def test_a_bpf_program_compiles_and_loads() -> None:
    text = "int answer(struct __sk_buff *skb) { return 42; }"
    programs, maps = compile_and_load(
        Source(text, sha256(text.encode()).digest()), functions=["answer"], maps=[]
    )
    assert (len(programs), len(maps)) == (1, 0)
    for program in programs:
        program.close()


def test_the_repository_is_a_copy_on_write_snapshot() -> None:
    """The host's side of this is checked by the runner (tools/vm/boot.py) after power off."""
    assert f" {REPOSITORY} overlay " in Path("/proc/self/mounts").read_text(encoding="utf-8")
