# SPDX-License-Identifier: Apache-2.0
"""conftest.py keeps its promise: in CI, a skip that the kernel does not confirm is a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import pytest

from tests.kernel_features import PROBES, SKIP_REASON_PREFIX, kernel_has
from tests.sources import REPOSITORY

if TYPE_CHECKING:
    from pathlib import Path

_SKIPS_ITSELF: Final = "import pytest\ndef test_it():\n    pytest.skip({reason!r})\n"
_SKIPS_ITS_MODULE: Final = "import pytest\npytest.skip({reason!r}, allow_module_level=True)\n"


def _outcome(tmp_path: Path, source: str, *, ci: bool) -> int:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    root: x\n    kernel_feature(name): x\n")
    (tmp_path / "test_probe.py").write_text(source)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
    ]
    environment = {**os.environ, "DATAPATH_CI": "1" if ci else "0", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode


@pytest.mark.parametrize("source", [_SKIPS_ITSELF, _SKIPS_ITS_MODULE], ids=["test", "module"])
def test_ci_refuses_an_unknown_reason(tmp_path: Path, source: str) -> None:
    assert _outcome(tmp_path, source.format(reason="not today"), ci=True) != 0


def test_without_ci_a_skip_is_a_skip(tmp_path: Path) -> None:
    assert _outcome(tmp_path, _SKIPS_ITSELF.format(reason="not today"), ci=False) == 0


@pytest.mark.root
def test_ci_asks_the_kernel_again(tmp_path: Path) -> None:
    for feature in ("veth", "vrf"):
        refused = _outcome(tmp_path, _SKIPS_ITSELF.format(reason=SKIP_REASON_PREFIX + feature), ci=True) != 0
        assert refused == kernel_has(feature)


@pytest.mark.root
def test_a_feature_that_is_there_is_used(tmp_path: Path) -> None:
    source = "import pytest\n@pytest.mark.kernel_feature('veth')\ndef test_it():\n    raise AssertionError\n"
    assert _outcome(tmp_path, source, ci=False) == pytest.ExitCode.TESTS_FAILED


def test_a_feature_without_a_probe_is_refused(tmp_path: Path) -> None:
    assert "warp_drive" not in PROBES
    source = "import pytest\n@pytest.mark.kernel_feature('warp_drive')\ndef test_it():\n    pass\n"
    assert _outcome(tmp_path, source, ci=False) == pytest.ExitCode.USAGE_ERROR
