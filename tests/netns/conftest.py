# SPDX-License-Identifier: Apache-2.0
"""Labs for the tests: one per module and DNAT flavour, because building one costs half a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tools.lab import Dnat, Lab, command, network

Apply = Callable[..., str]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """A lab with one network and nftables DNAT, without a policy."""
    with Lab() as built:
        yield built


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directory of the module's lab."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture(scope="module")
def served(lab: Lab, state: Path) -> Lab:
    """The module's lab with its policy applied."""
    command.apply(lab, state, lab.policy())
    return lab


@pytest.fixture(scope="module", params=list(Dnat), ids=str)
def any_dnat_lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """A lab with two networks per DNAT flavour, without a policy."""
    with Lab(dnat=request.param, networks=[network(0), network(1)]) as built:
        yield built
