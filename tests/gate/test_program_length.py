# SPDX-License-Identifier: Apache-2.0
"""How long our two eBPF programs are: a change that makes them longer must say so here.

Instructions are counted; other versions of LLVM and of the kernel differ by a few percent. Which of them a packet meets
is told by time alone, so that is compared with a program that does nothing, in the same run: the limits have much room,
and what they notice is more look-ups or helpers on the usual path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from tests.bpf.packets import ETH_P_IP, ETH_P_IPV6, frame, ipv4, ipv6
from tests.gate.programs import NOTHING, Length, Programs, loaded

pytestmark = [pytest.mark.root, pytest.mark.bpf]

#: Program -> instructions, and those that the verifier walked.
BUDGET: Final = {
    "datapath_in": Length(1434, 11122),
    # The index is compared without a loop or a call: longer, and a packet takes half the time.
    "datapath_out": Length(596, 1264),
}
#: More is longer; less, too, fails: a budget that is too large would let the next change through.
ROOM: Final = 0.04
_UNSPEC, _SHOT, _REDIRECT = 0xFFFFFFFF, 2, 7

_CLIENT, _VIP = {4: "198.51.100.7", 6: "2001:db8:9::7"}, {4: "192.0.2.9", 6: "2001:db8:100::9"}
_POD = {4: "10.244.1.7", 6: "fd00:10:244::7"}
#: Class of packet -> program, source, destination, what it returns, and the limit as a multiple of an empty program.
CLASSES: Final = {
    "to a VIP": ("datapath_in", _CLIENT, _VIP, _UNSPEC, 4.2),
    "spoofed": ("datapath_in", _POD, _VIP, _SHOT, 4.5),
    "not ours": ("datapath_out", _POD, _CLIENT, _UNSPEC, 1.5),
    "reply": ("datapath_out", _VIP, _CLIENT, _REDIRECT, 3.7),
}


def packet(source: str, destination: str) -> bytes:
    if ":" in source:
        return frame(ETH_P_IPV6, ipv6(source, destination))
    return frame(ETH_P_IP, ipv4(source, destination))


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with loaded() as made:
        yield made


@pytest.mark.parametrize("name", BUDGET)
def test_instructions(programs: Programs, name: str) -> None:
    length, budget = programs.length(name), BUDGET[name]
    assert abs(length.instructions - budget.instructions) <= ROOM * budget.instructions
    if length.verified:
        assert abs(length.verified - budget.verified) <= ROOM * budget.verified


def test_length_is_read_from_the_right_place(programs: Programs) -> None:
    """A value, which takes two places, and the exit."""
    assert programs.length(NOTHING) in {Length(3, 2), Length(3, 0)}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("kind", CLASSES)
def test_time_by_that_of_an_empty_program(programs: Programs, kind: str, version: int) -> None:
    name, source, destination, verdict, most = CLASSES[kind]
    data = packet(source[version], destination[version])
    assert programs.verdict(name, data) & 0xFFFFFFFF == verdict
    assert programs.ratio(name, data) <= most
