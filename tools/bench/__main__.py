# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: `python -m tools.bench forwarding --networks 1,4094 --repetitions 21 --json out.json`.

Needs root. Works in namespaces of its own, which are removed in the end. Progress goes to stderr, tables to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from tools.bench import forwarding, machine, plan, tables, variants
from tools.bench.frames import PROFILES

FORMAT: Final = 1
_STARTED: Final = time.monotonic()


def _say(text: str) -> None:
    print(f"[{time.monotonic() - _STARTED:6.0f} s] {text}", file=sys.stderr, flush=True)


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(word) for word in text.split(",")})
    if not numbers or not 1 <= numbers[0] <= numbers[-1] <= plan.NETWORKS_MAX:
        raise argparse.ArgumentTypeError(f"numbers of networks are 1 to {plan.NETWORKS_MAX}")
    return numbers


def _of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        words = text.split(",")
        unknown = [word for word in words if word not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {','.join(known)}")
        return [name for name in known if name in words]

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=(__doc__ or "").splitlines()[0]
    )
    verbs = parser.add_subparsers(required=True, metavar="WHAT")
    names = list(variants.TITLES)

    forward = verbs.add_parser("forwarding", help="ns per packet of every variant")
    forward.add_argument("--networks", type=_numbers, default=[1, 1000], help="default: 1,1000")
    forward.add_argument(
        "--variants", type=_of(names), default=names, help=f"of {','.join(names)}; the base is added"
    )
    forward.add_argument("--profiles", type=_of(list(PROFILES)), default=list(PROFILES), help=_profile_help())
    forward.add_argument("--families", type=_of(["4", "6"]), default=["4", "6"], help="4, 6 or 4,6 (default)")
    forward.add_argument("--repetitions", type=int, default=21, help="interleaved; default: 21")
    forward.set_defaults(command=_forwarding)

    for verb in verbs.choices.values():
        verb.add_argument(
            "--json", type=Path, help="write the result, with every sample and the machine's facts"
        )
    return parser


def _profile_help() -> str:
    return "of " + ", ".join(f"{letter} ({profile.title})" for letter, profile in PROFILES.items())


def _wanted(arguments: argparse.Namespace) -> forwarding.Wanted:
    chosen = set(arguments.variants) | {variants.BASE}
    return forwarding.Wanted(
        networks=arguments.networks,
        variants=[name for name in variants.TITLES if name in chosen],
        profiles=arguments.profiles,
        families=[int(family) for family in arguments.families],
        repetitions=arguments.repetitions,
    )


def _forwarding(arguments: argparse.Namespace) -> dict[str, Any]:
    result = forwarding.measure(_wanted(arguments), _say)
    for table in tables.forwarding_tables(result):
        print(table.text())
    for line in tables.notes(result):
        print(f"no figure: {line}")
    return {"forwarding": result}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = _parser().parse_args(argv)
    facts, steal = machine.facts(), machine.steal_s()
    result = {"format": FORMAT, "machine": facts, **arguments.command(arguments)}
    facts["stolen_s"] = round(machine.steal_s() - steal, 2)
    facts["took_s"] = round(time.monotonic() - _STARTED)
    if arguments.json:
        arguments.json.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
