# SPDX-License-Identifier: Apache-2.0
"""Our two eBPF programs and one that does nothing, loaded for a fixed policy: their lengths and times."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final

from datapath.kernel.bpf import Capacities, abi, compiler, libbpf, source, verify_ingress
from datapath.kernel.bpf.steering import LoadedSteering
from datapath.kernel.bpf.steering_tables import resolve_steering
from datapath.plan.ingress import (
    IngressNetwork,
    IngressPoint,
    IngressProgram,
    OtherCheck,
    SourceAction,
    SourceRule,
    VipCheck,
)
from datapath.plan.steering import SteeredNetwork, SteeringProgram

NOTHING: Final = "nothing"
_VIPS: Final = tuple(map(ip_network, ("192.0.2.0/24", "2001:db8:100::/64")))
_INSIDE: Final = tuple(map(ip_network, ("10.96.0.0/12", "10.244.0.0/16", "fd00:10::/32")))
#: One network with every check, as a policy of one network compiles.
_INGRESS: Final = IngressProgram(
    0x0FFF0000,
    (
        IngressNetwork(
            name="public",
            slot=1,
            fwmark=0x00010000,
            point=IngressPoint("lo"),
            device="lo",
            vips=_VIPS,
            vip_check=VipCheck.FEASIBLE,
            other_check=OtherCheck.STRICT,
            feasible=tuple(map(ip_network, ("0.0.0.0/0", "::/0"))),
            check_martians=True,
            check_sources=True,
        ),
    ),
    common_sources=tuple(SourceRule(prefix, SourceAction.DENY) for prefix in (*_VIPS, *_INSIDE)),
)
_EGRESS: Final = SteeringProgram(
    devices=("lo",),
    networks=(
        SteeredNetwork(
            name="public",
            slot=1,
            device="vlan100",
            vips=_VIPS,
            gateways=tuple(map(ip_address, ("192.0.2.1", "2001:db8:100::1"))),
            on_link=_VIPS,
        ),
    ),
    passed=_INSIDE,
)
_CONTEXT_BYTES, _IFINDEX_AT, _LO = 180, 40, 1
_REPEAT: Final = 20_000
_ROUNDS: Final = 15


class _Info(ctypes.Structure):
    """`struct bpf_prog_info` up to `verified_insns` (Linux 5.16). Without buffers the kernel fills in sizes only."""

    _pack_ = 1
    _fields_ = (
        ("before", ctypes.c_uint8 * 20),
        ("translated_bytes", ctypes.c_uint32),
        ("between", ctypes.c_uint8 * 192),
        ("verified_insns", ctypes.c_uint32),
        ("padding", ctypes.c_uint32),
    )


@dataclass(frozen=True)
class Length:
    """Of a loaded program.

    Attributes:
        instructions: as the kernel runs them, its own inlined map look-ups included.
        verified: how many steps the verifier took; 0 where the kernel does not tell.
    """

    instructions: int
    verified: int


class Programs:
    """What was loaded, by name."""

    def __init__(self, programs: dict[str, libbpf.OwnedFd]) -> None:
        self._programs = programs

    def length(self, name: str) -> Length:
        info = _Info()
        size = ctypes.c_uint32(ctypes.sizeof(info))
        number = self._programs[name].number
        result = libbpf.library().bpf_obj_get_info_by_fd(number, ctypes.byref(info), ctypes.byref(size))
        libbpf.check("read the info of a program", result)
        return Length(info.translated_bytes // 8, info.verified_insns)

    def verdict(self, name: str, data: bytes) -> int:
        """What the program returns for a packet."""
        return self._run(name, data, 1).return_value

    def ratio(self, name: str, data: bytes) -> float:
        """Least time of the program for this packet, by that of the one that does nothing, in turns."""
        rounds = [
            [self._run(one, data, _REPEAT).duration_ns for one in (NOTHING, name)] for _ in range(_ROUNDS)
        ]
        return min(program for _, program in rounds) / min(nothing for nothing, _ in rounds)

    def _run(self, name: str, data: bytes, repeat: int) -> libbpf.TestRun:
        context = bytearray(_CONTEXT_BYTES)
        struct.pack_into("=I", context, _IFINDEX_AT, _LO)
        return libbpf.program_test_run(self._programs[name], data, context=bytes(context), repeat=repeat)


def _compiled(entry: Path, name: str, maps: tuple[str, ...]) -> tuple[libbpf.OwnedFd, list[libbpf.Map]]:
    text = source.render(0, Capacities(16, 16), entry=entry)
    (program,), fds = compiler.compile_and_load(text, functions=[name], maps=maps)
    return program, list(map(libbpf.Map, fds))


@contextlib.contextmanager
def loaded() -> Iterator[Programs]:
    """Load all three and fill the maps; nothing is attached."""
    with contextlib.ExitStack() as stack:
        ingress = stack.enter_context(verify_ingress(_INGRESS))
        steering = stack.enter_context(
            LoadedSteering(*_compiled(source.steering_entry(), abi.STEERING_NAME, abi.STEERING_MAP_NAMES))
        )
        steering.write_tables(resolve_steering(_EGRESS, {"lo": _LO, "vlan100": 100}))
        nothing, _ = _compiled(Path(__file__).with_name("nothing.bpf.c"), NOTHING, ())
        programs = {NOTHING: stack.enter_context(nothing)}
        for one in (ingress, steering):
            programs[one.name] = stack.enter_context(libbpf.program_fd_by_id(one.program_id))
        yield Programs(programs)
