# SPDX-License-Identifier: Apache-2.0
"""The same inputs through the natively built program and through the reference model."""

from __future__ import annotations

import struct
import subprocess
from typing import TYPE_CHECKING, Final

from datapath.observe.packet import Frame, parse_frame, parse_ip
from datapath.observe.reference import judge
from datapath.plan.ingress import Verdict
from tools.fuzz import world

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from datapath.observe.packet import IpAddress
    from datapath.observe.reference import Arrival, Judgement

_TIMEOUT_S: Final = 120
_TC_ACT_UNSPEC, _TC_ACT_SHOT = -1, 2
_SEGMENTS: Final = 2
_FIB: Final = world.FakeFib()
#: What the drop sample of a malformed packet tells beyond its verdict depends on how far the parser got.
_UNKNOWN_SAMPLE: Final = "?"


class ReplayError(Exception):
    """The program crashed; the text is the sanitizer's report."""


def _padded(address: IpAddress) -> str:
    return address.packed.ljust(16, b"\0").hex()


def _expected_sample(arrival: Arrival, judgement: Judgement) -> str:
    if judgement.passes:
        return ""
    place = f"sample {world.IFINDEXES[arrival.ifname]} {judgement.slot} {int(judgement.verdict)}"
    frame = parse_frame(arrival.data, arrival.metadata_tag)
    packet = parse_ip(frame, is_merged=arrival.is_merged) if isinstance(frame, Frame) else None
    if packet is None:
        return f"{place} {_UNKNOWN_SAMPLE}"
    numbers = f"{packet.version} {packet.protocol} {packet.source_port} {packet.destination_port}"
    return f"{place} {numbers} {_padded(packet.source)} {_padded(packet.destination)} 1"


def expected(data: bytes) -> str:
    """The line that the program should print for an input, by the reference model."""
    arrival = world.to_arrival(data)
    judgement = judge(world.PROGRAM, arrival, _FIB)
    action = _TC_ACT_UNSPEC if judgement.passes else _TC_ACT_SHOT
    if judgement.slot is None:
        return f"{action} {judgement.mark} - - 0 0 0"
    counted = f"{_SEGMENTS if arrival.is_merged else 1} {len(arrival.data)}"
    place = f"{action} {judgement.mark} {judgement.slot} {int(judgement.verdict)} {counted}"
    return f"{place} {_expected_sample(arrival, judgement) or 0}"


def agrees(line: str, wanted: str) -> bool:
    """Whether a line of the program is what `expected` asks for."""
    if wanted.endswith(_UNKNOWN_SAMPLE):
        return line.startswith(wanted.removesuffix(_UNKNOWN_SAMPLE)) and line.endswith(" 1")
    return line == wanted


def native(program: Path, inputs: Sequence[bytes]) -> list[str]:
    """What the replay program prints for each input.

    Raises:
        ReplayError: it ended early.
    """
    stream = b"".join(struct.pack("<H", len(data)) + data for data in inputs)
    result = subprocess.run(
        [str(program)], input=stream, capture_output=True, timeout=_TIMEOUT_S, check=False
    )
    lines = result.stdout.decode().splitlines()
    if result.returncode != 0 or len(lines) != len(inputs):
        raise ReplayError(result.stderr.decode(errors="replace"))
    return lines


def verdict_of(line: str) -> Verdict | None:
    """The verdict in a line; None if the packet belongs to no network."""
    field = line.split()[3]
    return None if field == "-" else Verdict(int(field))
