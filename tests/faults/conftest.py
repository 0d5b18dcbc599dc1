# SPDX-License-Identifier: Apache-2.0
"""What tests on the fake kernel share."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from datapath import controller
from datapath.policy import parse_policy
from datapath.service import healer
from tests.fake_kernel.site import Site


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    # What reaches the disk is tested where it matters; here it would be most of the time. So would be reading
    # the same few policies, and writing a log that nobody reads.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    for module in (controller, healer):
        monkeypatch.setattr(module, "parse_policy", functools.cache(parse_policy))
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    yield Site(tmp_path, monkeypatch)
    structlog.configure(**before)
