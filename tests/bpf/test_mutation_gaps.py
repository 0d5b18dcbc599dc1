# SPDX-License-Identifier: Apache-2.0
"""What only a changed program (`python -m tools.mutate`) showed to be untested."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from datapath.kernel.bpf import IngressTables, NetworkEntry, PointKey
from tests.bpf.harness import TC_ACT_UNSPEC, Outcome, harness
from tests.bpf.packets import ETH_P_IP, frame, ipv4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bpf.harness import Harness

pytestmark = [pytest.mark.root, pytest.mark.bpf]

MASK = 0x0A5F0000
LO = 1


@pytest.fixture(scope="module")
def program(module_node: str) -> Iterator[Harness]:
    assert module_node
    with harness(MASK, IngressTables()) as loaded:
        yield loaded


def test_mark_of_a_network_never_leaves_the_mask(program: Harness) -> None:
    """The plan refuses such a value; the program does not rely on it."""
    entry = NetworkEntry(slot=1, fwmark=0xFFFFFFFF, device_ifindex=LO)
    program.loaded.write_tables(IngressTables(networks={PointKey(LO, 0, 0): entry}))
    outcome = program.run(frame(ETH_P_IP, ipv4("192.0.2.1", "198.51.100.1")), mark=0x00000001)
    assert outcome == Outcome(TC_ACT_UNSPEC, 0x00000001 | MASK)
