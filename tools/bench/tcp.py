# SPDX-License-Identifier: Apache-2.0
"""TCP through the node, both ends on one CPU: streams, transactions, connections. A sanity check, not a ranking.

A stream with segmentation offload hides a policy (64 kB per traversal); the MTU-sized one does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tools import clang
from tools.bench import frames, plan, variants
from tools.bench.ground import Ground, Link, Site, mac_text, pin, site
from tools.bench.programs import loaded
from tools.bench.variants import UnavailableError
from tools.lab.netns import LabError, Namespace
from tools.lab.topology import FAMILIES

_SOURCE: Final = Path(__file__).with_name("tcp.c")
_SECONDS: Final = 0.3
_TIMEOUT_S: Final = 30
#: linux/ethtool.h, linux/sockios.h: the old way to say `ethtool -K`, without a program for it.
_SIOCETHTOOL: Final = 0x8946
_OFFLOADS: Final = (0x1F, 0x24)  # ETHTOOL_STSO, ETHTOOL_SGSO

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of load.

    Attributes:
        verb: of tcp.c.
        scale: of its figure in the unit.
        offload: the client's device takes 64 kB at once and passes them on like that.
    """

    name: str
    verb: str
    unit: str
    scale: float = 1.0
    offload: bool = True


LOADS: Final = (
    Load("stream, TSO", "stream", "Gb/s", 8e-9),
    Load("stream, MTU-sized", "stream", "Gb/s", 8e-9, offload=False),
    Load("request/response", "rr", "1000/s", 1e-3),
    Load("connect/request/response", "crr", "1000/s", 1e-3),
)


def build(folder: Path) -> Path:
    """Compile tcp.c.

    Raises:
        BuildError: it does not compile.
    """
    return clang.build(["-O2", "-Wall", "-Wextra", "-Werror", str(_SOURCE)], folder / "tcp")


@dataclass(slots=True)
class _End:
    """Client and server of one ground."""

    ground: Ground
    client: Namespace
    server: subprocess.Popen[str]
    figures: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    problems: dict[tuple[str, int], str] = field(default_factory=dict)


def _settle(built: Ground, link: Link, namespace: Namespace) -> None:
    """Move the far end of a link to a namespace of its own: both in one would talk past the node."""
    built.around.ip([f"link set {link.far} netns {namespace.name}"])
    namespace.ip([f"link set {link.far} up"])


def _client(built: Ground, namespace: Namespace) -> None:
    _settle(built, built.vlan, namespace)
    lines = []
    for family in FAMILIES:
        option, nodad, bits, all_bits = ("-4 ", "", 29, 32) if family == 4 else ("-6 ", " nodad", 125, 128)
        node = plan.vip(built.network, 254).get(family)
        vips = plan.vip(built.network, plan.POD_VIPS).get(family)
        lines += [
            f"{option}addr add {plan.CLIENTS.get(family) + 16}/{all_bits} dev {built.vlan.far}{nodad}",
            f"{option}neigh add {node} lladdr {mac_text(built.vlan.near_mac)} dev {built.vlan.far}",
            f"{option}route add {vips}/{bits} via {node} dev {built.vlan.far} onlink",
        ]
    namespace.ip(lines)


def _pod(built: Ground, namespace: Namespace) -> None:
    _settle(built, built.pod, namespace)
    lines = []
    for family in FAMILIES:
        option, nodad, bits, all_bits = ("-4 ", "", 24, 32) if family == 4 else ("-6 ", " nodad", 64, 128)
        gateway = plan.POD_SIDE.get(family)
        lines += [
            f"{option}addr add {plan.POD.get(family)}/{bits} dev {built.pod.far}{nodad}",
            f"{option}neigh add {gateway} lladdr {mac_text(built.pod.near_mac)} dev {built.pod.far}",
            f"{option}route add default via {gateway} dev {built.pod.far}",
        ]
        lines += [
            f"{option}addr add {plan.vip(built.network, plan.POD_VIPS + offset).get(family)}/{all_bits} dev lo{nodad}"
            for offset in range(plan.VIPS)
        ]
    namespace.ip(lines)


@contextlib.contextmanager
def _end(built: Site, ground: Ground, program: Path) -> Iterator[_End]:
    built.without_xdp(ground)
    client, pod = built.namespace("client"), built.namespace("pod")
    _client(ground, client)
    _pod(ground, pod)

    def start() -> subprocess.Popen[str]:
        pin()
        argv = [str(program), "serve", str(frames.SERVICE_PORT)]
        return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)

    server = pod.call(start)
    try:
        assert server.stdout is not None  # noqa: S101  (we asked for a pipe)
        server.stdout.readline()
        yield _End(ground, client, server)
    finally:
        server.kill()
        server.wait()


def _set_offload(device: str, *, on: bool) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in _OFFLOADS:
            value = ctypes.create_string_buffer(struct.pack("=II", command, on), 8)
            request = struct.pack("=16sQ16x", device.encode(), ctypes.addressof(value))
            fcntl.ioctl(sock.fileno(), _SIOCETHTOOL, request)


def _once(end: _End, program: Path, load: Load, family: int) -> None:
    key = load.name, family
    if key in end.problems:
        return
    address = plan.vip(end.ground.network, plan.POD_VIPS).get(family)

    def run() -> str:
        pin()
        argv = [str(program), load.verb, str(address), str(frames.SERVICE_PORT), str(_SECONDS)]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S).stdout

    try:
        end.client.call(functools.partial(_set_offload, end.ground.vlan.far, on=load.offload))
        end.figures.setdefault(key, []).append(float(end.client.call(run)) * load.scale)
    except subprocess.SubprocessError as error:
        end.problems[key] = str(getattr(error, "stderr", "") or error).strip()[:200]


def measure(counts: Sequence[int], names: Sequence[str], repetitions: int, say: Say) -> dict[str, Any]:
    """Every variant and load in turn; the result as it is written to JSON."""
    with (
        tempfile.TemporaryDirectory(prefix="datapath-bench-") as folder,
        contextlib.ExitStack() as opened,
    ):
        program = build(Path(folder))
        programs = opened.enter_context(loaded())
        built = opened.enter_context(site(programs))
        ends: dict[tuple[str, int], _End] = {}
        for name in names:
            variant = variants.by_name(name)
            for count in counts if variant.has_networks else counts[:1]:
                ground = built.ground(count, all_devices=variant.has_networks)
                try:
                    variant.install(ground)
                except (UnavailableError, LabError) as error:
                    say(f"TCP: {name}, {count} networks: not available: {error}")
                    continue
                ends[name, count] = opened.enter_context(_end(built, ground, program))
        for repetition in range(repetitions):
            for load in LOADS:
                for family in FAMILIES:
                    turn = list(ends.values())
                    for end in turn if repetition % 2 == 0 else reversed(turn):
                        _once(end, program, load, family)
            say(f"TCP: repetition {repetition + 1} of {repetitions}")
        return {"seconds": _SECONDS, "rows": [row for key, end in ends.items() for row in _rows(key, end)]}


def _rows(key: tuple[str, int], end: _End) -> Iterator[dict[str, Any]]:
    for load in LOADS:
        for family in FAMILIES:
            yield {
                "variant": key[0],
                "networks": key[1],
                "load": load.name,
                "unit": load.unit,
                "family": family,
                "samples": [round(figure, 3) for figure in end.figures.get((load.name, family), [])],
                "problem": end.problems.get((load.name, family), ""),
            }
