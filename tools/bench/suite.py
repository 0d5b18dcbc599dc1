# SPDX-License-Identifier: Apache-2.0
"""Whole runs: which parts, in which order, and what is kept when one of them fails."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tools.bench import control, forwarding, program_cost, tcp, variants
from tools.bench.frames import PROFILES

_IDLE_S: Final = 60
_IDLE_TIMEOUT_S: Final = 1200
_CHANGES_TIMEOUT_S: Final = 600
_CHANGES_APPLIES: Final = 6
_AGAIN_REPETITIONS: Final = 101
_AGAIN_VARIANTS: Final = ("base", "base2", "base3", "one-rule", "ebpf-rules", "ebpf-direct")
_AGAIN_PROFILES: Final = ("r", "n", "s", "u")
_RSS: Final = re.compile(r"idle for\s+([\d.]+) s\s+RSS\s+([\d.]+) MB, CPU ([\d.]+)%")
_ROOT: Final = Path(__file__).parents[2]

Say = Callable[[str], None]
Part = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Extent:
    """How much is measured.

    Attributes:
        networks: numbers of networks; at those between the first and the last, only some profiles.
        control_networks: numbers of networks for the control plane.
        with_rest: the parts that take long and do not need to be looked at each time; among them the cells that
            targets are about once more, more often: a machine that others use, too, is at its full speed only
            now and then, and the least of 21 runs of one cell may have met that, and of another not.
    """

    networks: Sequence[int]
    control_networks: Sequence[int]
    repetitions: int
    variants: Sequence[str]
    profiles: Sequence[str]
    control_rounds: int
    tcp_repetitions: int
    with_rest: bool


FULL: Final = Extent(
    networks=(1, 10, 100, 1000, 4094),
    control_networks=(1, 100, 1000, 4094),
    repetitions=21,
    variants=tuple(variants.TITLES),
    profiles=tuple(PROFILES),
    control_rounds=5,
    tcp_repetitions=5,
    with_rest=True,
)
QUICK: Final = Extent(
    networks=(1, 1000),
    control_networks=(100,),
    repetitions=21,
    variants=("plain", "base", "base2", "classic-legacy", "ebpf-rules", "ebpf-direct"),
    profiles=("r", "n", "s", "u"),
    control_rounds=1,
    tcp_repetitions=0,
    with_rest=False,
)


def parts(extent: Extent, say: Say) -> dict[str, Part]:
    """What a run consists of, by the name in its JSON."""
    wanted = forwarding.Wanted(
        networks=extent.networks,
        variants=extent.variants,
        profiles=extent.profiles,
        repetitions=extent.repetitions,
        profiles_between=[letter for letter in extent.profiles if letter in "rnu"],
    )
    ends = sorted({extent.networks[0], extent.networks[-1]})
    backends = ("ebpf", "nft") if extent.with_rest else ("ebpf",)
    found: dict[str, Part] = {
        "forwarding": lambda: forwarding.measure(wanted, say),
        "programs": lambda: program_cost.measure(ends, extent.control_rounds, say),
    }
    if extent.with_rest:
        names = [variant.name for variant in variants.VARIANTS if variant.name not in {"base2", "base3"}]
        again = forwarding.Wanted(ends, _AGAIN_VARIANTS, _AGAIN_PROFILES, repetitions=_AGAIN_REPETITIONS)
        found |= {
            "again": lambda: forwarding.measure(again, say),
            "tcp": lambda: tcp.measure(ends, names, extent.tcp_repetitions, say),
            "idle": lambda: [idle(count, say) for count in sorted({100, ends[-1]})],
            "changes": lambda: changes(say),
        }
    # Last, because it takes longest: a run that is broken off has the others.
    found["control"] = lambda: control.measure(
        extent.control_networks, extent.control_rounds, say, backends=backends
    )
    return found


def run(
    wanted: dict[str, Part], result: dict[str, Any], keep: Callable[[dict[str, Any]], None], say: Say
) -> None:
    """Run part after part; one that fails is noted in `failed`, and the others are measured all the same."""
    for name, part in wanted.items():
        say(f"part {name}")
        try:
            result[name] = part()
        except Exception as error:  # noqa: BLE001  (an hour of figures is worth more than the reason is precise)
            result.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:1000]
            say(f"part {name} failed: {error}")
        keep(result)


def idle(networks: int, say: Say) -> dict[str, Any]:
    """Memory and CPU of the daemon with nothing to do.

    Raises:
        LookupError: the figures were not printed.
    """
    argv = [sys.executable, "-m", "tools.bench.idle_daemon", "--networks", str(networks)]
    argv += ["--seconds", str(_IDLE_S), "--reconciles", "0"]
    done = subprocess.run(
        argv, capture_output=True, text=True, check=False, timeout=_IDLE_TIMEOUT_S + _IDLE_S, cwd=_ROOT
    )
    match = _RSS.search(done.stdout)
    if not match:
        raise LookupError(f"idle_daemon: {(done.stderr or done.stdout)[-500:]}")
    say(f"idle daemon, {networks} networks: {match[0]}")
    return {
        "networks": networks,
        "seconds": float(match[1]),
        "rss_mb": float(match[2]),
        "cpu": float(match[3]) / 100,
    }


def changes(say: Say) -> list[dict[str, Any]]:
    """Packets lost or misrouted during changes, by kind.

    Raises:
        LookupError: it ended without figures.
    """
    with tempfile.TemporaryDirectory(prefix="datapath-bench-") as folder:
        path = Path(folder, "changes.json")
        argv = [
            sys.executable,
            "-m",
            "tools.bench.changes",
            "--applies",
            str(_CHANGES_APPLIES),
            "--json",
            str(path),
        ]
        done = subprocess.run(
            argv, capture_output=True, text=True, check=False, timeout=_CHANGES_TIMEOUT_S, cwd=_ROOT
        )
        if not path.exists():
            raise LookupError(f"changes: {(done.stderr or done.stdout)[-500:]}")
        found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    say(f"changes: {len(found)} kinds")
    return found
