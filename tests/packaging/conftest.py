# SPDX-License-Identifier: Apache-2.0
"""tests/packaging/deb builds a package and a Debian to install it into: minutes, so it is `make test-deb`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _pytest.config import Config

_ASKED_FOR = os.environ.get("DATAPATH_TEST_DEB") == "1"


def pytest_ignore_collect(collection_path: os.PathLike[str], config: Config) -> bool | None:
    """Collected only where asked for."""
    folder = config.rootpath / "tests/packaging/deb"
    return True if Path(collection_path) == folder and not _ASKED_FOR else None
