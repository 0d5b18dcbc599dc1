# SPDX-License-Identifier: Apache-2.0
"""Where a program meets packets: the tc nouns."""

from __future__ import annotations

import enum


class Direction(enum.StrEnum):
    """Which packets of a device."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Hook(enum.StrEnum):
    """How a program is attached: tcx where the kernel has it (6.6), else a filter on a clsact qdisc."""

    TCX = "tcx"
    CLSACT = "clsact"
