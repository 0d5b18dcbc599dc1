# SPDX-License-Identifier: Apache-2.0
"""Nodes for daemons."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.service.daemon import FIRST, SECOND, Node, policy


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node with a policy of two networks that nobody has applied yet."""
    made = Node(tmp_path)
    made.policy.write_text(policy(FIRST, SECOND))
    yield made
    made.close()
