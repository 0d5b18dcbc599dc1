# SPDX-License-Identifier: Apache-2.0
"""The parse headers are plain C: built natively, with sanitizers, they say what the reference model says."""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from datapath.kernel.bpf.source import bpf_directory
from datapath.observe.packet import FrameProblem, parse_frame, parse_ip
from datapath.observe.reference import has_no_reverse_path, is_link_traffic, is_martian
from tests.bpf.generator import Devices, random_arrival, random_program
from tests.bpf.packets import ETH_P_IP, ETH_P_IPV6

if TYPE_CHECKING:
    from collections.abc import Callable

_SOURCE = Path(__file__).with_name("native.c")


@pytest.fixture(scope="module")
def parse_native(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], int]:
    library = tmp_path_factory.mktemp("native") / "native.so"
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    checks = ["-fsanitize=undefined", "-fsanitize-trap=all"]
    subprocess.run(
        [
            "clang-14",
            "-O1",
            "-g",
            "-shared",
            "-fPIC",
            *warnings,
            *checks,
            "-I",
            bpf_directory(),
            "-o",
            library,
            _SOURCE,
        ],
        check=True,
    )
    function = ctypes.CDLL(str(library)).parse_native

    def parse(data: bytes) -> int:
        return int(function(data, len(data)))

    return parse


def _expected(data: bytes) -> int:
    frame = parse_frame(data)
    if isinstance(frame, FrameProblem) or frame.ethertype not in {ETH_P_IP, ETH_P_IPV6}:
        return 0
    packet = parse_ip(frame)
    if packet is None:
        return 1
    is_dropped = is_martian(packet.source) and not is_link_traffic(packet) and not has_no_reverse_path(packet)
    return 6 if is_dropped else 2


def test_native_parser_agrees_with_the_model(parse_native: Callable[[bytes], int]) -> None:
    rng = random.Random(20)
    devices = Devices(trunk="trunk0", networks=("net0",))
    program = random_program(rng, devices)
    seen = set()
    for _ in range(20_000):
        data = random_arrival(rng, program, devices).data
        expected = _expected(data)
        assert parse_native(data) == expected, data.hex()
        seen.add(expected)
    assert seen == {0, 1, 2, 6}


def test_every_cut_of_a_packet_is_read_within_its_bounds(parse_native: Callable[[bytes], int]) -> None:
    rng = random.Random(21)
    devices = Devices(trunk="trunk0", networks=("net0",))
    program = random_program(rng, devices)
    for _ in range(60):
        data = random_arrival(rng, program, devices).data
        for length in range(len(data)):
            assert parse_native(data[:length]) == _expected(data[:length]), data[:length].hex()
