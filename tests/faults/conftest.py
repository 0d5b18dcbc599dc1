# SPDX-License-Identifier: Apache-2.0
"""What tests on the fake kernel share; and programs that tests load again and again are compiled once a module."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from datapath import controller, in_force
from datapath.kernel.bpf import objects
from datapath.policy import parse_policy
from tests.fake_kernel.site import Site


@pytest.fixture(scope="module", autouse=True)
def _kept_programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The compiler is no part of what is refused or killed here, and would be most of the time.

    That a kept program is the compiled one is shown by tests/bpf/test_objects.py.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(objects.ENVIRONMENT, str(tmp_path_factory.mktemp("objects")))
        yield


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # What reaches the disk is tested where it matters; here it would be most of the time. So would be reading
    # the same few policies, and writing a log that nobody reads.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for module in (controller, in_force):
        monkeypatch.setattr(module, "parse_policy", functools.cache(parse_policy))
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield Site(tmp_path, monkeypatch)
    structlog.configure(**before)
