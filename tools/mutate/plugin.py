# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: the tests of this run see the C sources in `DATAPATH_MUTANT`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from datapath.kernel.bpf import compiler, source

VARIABLE: Final = "DATAPATH_MUTANT"


def _directory() -> Path:
    return Path(os.environ[VARIABLE])


def pytest_configure() -> None:
    """Before any test module is imported; each of these modules has its own name for the function."""
    # setattr: the type checker knows the name as a cached function.
    for module in (source, compiler):
        vars(module)["bpf_directory"] = _directory
