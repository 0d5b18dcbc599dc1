# SPDX-License-Identifier: Apache-2.0
"""What our eBPF programs cost by themselves: BPF_PROG_TEST_RUN of the attached programs, less one that does nothing."""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from datapath.kernel.bpf import libbpf, tcx
from datapath.plan.tc import Direction
from tools.bench import variants
from tools.bench.frames import PROFILES, frame
from tools.bench.ground import Ground, Link, site
from tools.bench.programs import Programs, loaded
from tools.bench.variants import UnavailableError
from tools.lab.topology import FAMILIES

_REPEAT: Final = 200_000
#: `struct __sk_buff` is UAPI: these never change.
_CONTEXT_BYTES, _IFINDEX_AT = 180, 40
_VARIANTS: Final = ("ebpf-rules", "ebpf-direct")

#: What each program is shown, by the direction in which it is attached: names of profiles.
_SHOWN: Final = {Direction.INGRESS: "osx", Direction.EGRESS: "ru"}

Say = Callable[[str], None]


def attached(built: Ground, link: Link, direction: Direction) -> list[int]:
    """Ids of the programs at one side of a device, by tcx and by tc filter."""
    found = list(built.node.call(lambda: tcx.programs(link.ifindex, direction))) if tcx.is_supported() else []
    text = built.node.run("tc", "-j", "filter", "show", "dev", link.near, direction.value)
    options = [item.get("options", {}) for item in json.loads(text or "[]")]
    return found + [option["prog"]["id"] for option in options if "prog" in option]


def _shown(built: Ground, link: Link, direction: Direction) -> Iterator[tuple[str, int, bytes]]:
    for letter in _SHOWN[direction]:
        profile = PROFILES[letter]
        for family in FAMILIES:
            first = frame(profile, built.network, family, link.ether)
            if direction is Direction.EGRESS:
                first = _reversed(first, family)
            yield f"{profile.title}{', reply' if direction is Direction.EGRESS else ''}", family, first


def _reversed(first: bytes, family: int) -> bytes:
    """Addresses exchanged, as the pod answers."""
    start, size = (26, 4) if family == 4 else (22, 16)
    middle, end = start + size, start + 2 * size
    return first[:start] + first[middle:end] + first[start:middle] + first[end:]


def _run(programs: Programs, program: libbpf.OwnedFd, link: Link, data: bytes) -> tuple[int, int]:
    """Cost of the program, and of one that does nothing, in ns."""
    context = bytearray(_CONTEXT_BYTES)
    struct.pack_into("=I", context, _IFINDEX_AT, link.ifindex)
    runs = [
        libbpf.program_test_run(one, data, context=bytes(context), repeat=_REPEAT).duration_ns
        for one in (programs.owned("nothing"), program)
    ]
    return runs[1], runs[0]


def _rows(programs: Programs, built: Ground, rounds: int) -> Iterator[dict[str, Any]]:
    for link, direction in ((built.vlan, Direction.INGRESS), (built.default, Direction.EGRESS)):
        for program_id in attached(built, link, direction):
            with libbpf.program_fd_by_id(program_id) as program:
                name = libbpf.program_info(program).name
                for title, family, data in _shown(built, link, direction):
                    run = functools.partial(_run, programs, program, link, data)
                    pairs = [built.node.call(run) for _ in range(rounds)]
                    yield {
                        "program": name,
                        "direction": direction.value,
                        "packet": title,
                        "family": family,
                        "samples": [pair[0] for pair in pairs],
                        "nothing": [pair[1] for pair in pairs],
                    }


def measure(counts: Sequence[int], rounds: int, say: Say) -> dict[str, Any]:
    """Each of our programs at each number of networks; the result as it is written to JSON."""
    rows: list[dict[str, Any]] = []
    unavailable: list[dict[str, Any]] = []
    with loaded() as programs:
        for count in counts:
            with site(programs) as built:
                for name in _VARIANTS:
                    ground = built.ground(count, all_devices=True)
                    about = {"variant": name, "networks": count}
                    try:
                        variants.by_name(name).install(ground)
                    except UnavailableError as error:
                        unavailable.append({**about, "reason": str(error)})
                        say(f"eBPF programs: {name}, {count} networks: not available: {error}")
                        continue
                    rows += [about | row for row in _rows(programs, ground, rounds)]
                    say(f"eBPF programs: {name}, {count} networks")
    return {"repeat": _REPEAT, "rows": rows, "unavailable": unavailable}
