# SPDX-License-Identifier: Apache-2.0
"""A copy of the C sources that a test may break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from datapath.kernel.bpf.source import bpf_directory


@pytest.fixture
def broken_bpf(tmp_path: Path) -> Path:
    """Whole, until the test changes it."""
    copy = tmp_path / "bpf"
    shutil.copytree(bpf_directory(), copy)
    return copy
