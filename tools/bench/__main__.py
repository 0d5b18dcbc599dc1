# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: `python -m tools.bench forwarding --networks 1,4094 --repetitions 21 --json out.json`.

Needs root. Works in namespaces of its own, which are removed in the end. Progress goes to stderr, tables to stdout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

from tools.bench import control, forwarding, machine, plan, program_cost, report, suite, tcp, variants
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

    controlled = verbs.add_parser(
        "control", help="load, no-op, add, change, remove, heal; against the classic recipe"
    )
    controlled.add_argument("--networks", type=_numbers, default=[1, 100, 1000], help="default: 1,100,1000")
    controlled.add_argument(
        "--backends", type=_of(["ebpf", "nft"]), default=["ebpf", "nft"], help="default: both"
    )
    controlled.add_argument("--rounds", type=int, default=3, help="default: 3")
    controlled.set_defaults(
        command=lambda a: {"control": control.measure(a.networks, a.rounds, _say, backends=a.backends)}
    )

    programs = verbs.add_parser("programs", help="ns of our eBPF programs by themselves")
    programs.add_argument("--networks", type=_numbers, default=[1, 100], help="default: 1,100")
    programs.add_argument("--rounds", type=int, default=5, help="default: 5")
    programs.set_defaults(command=lambda a: {"programs": program_cost.measure(a.networks, a.rounds, _say)})

    streams = verbs.add_parser("tcp", help="streams, transactions and connections on one CPU")
    streams.add_argument("--networks", type=_numbers, default=[1, 100], help="default: 1,100")
    usable = [variant.name for variant in variants.VARIANTS]
    streams.add_argument("--variants", type=_of(usable), default=usable, help=f"of {','.join(usable)}")
    streams.add_argument("--repetitions", type=int, default=5, help="default: 5")
    streams.set_defaults(command=lambda a: {"tcp": tcp.measure(a.networks, a.variants, a.repetitions, _say)})

    for name, extent, text in (
        ("all", suite.FULL, "everything, with plots: about an hour"),
        ("quick", suite.QUICK, "what matters most, in less than 3 minutes"),
    ):
        whole = verbs.add_parser(name, help=text)
        whole.add_argument(
            "--networks", type=_numbers, help=f"default: {','.join(map(str, extent.networks))}"
        )
        whole.add_argument("--repetitions", type=int, help=f"default: {extent.repetitions}")
        whole.add_argument("--output", type=Path, required=True, help="directory for table, JSON and plots")
        whole.set_defaults(command=_whole, extent=extent)

    told = verbs.add_parser(
        "report", help="print the tables of a result; fill them into pages, draw its plots"
    )
    told.add_argument("result", type=Path, help="JSON of an earlier run")
    told.add_argument(
        "--page", type=Path, action="append", default=[], help="a page with markers, rewritten in place"
    )
    told.add_argument("--plots", type=Path, metavar="DIRECTORY", help="draw the plots there")
    told.set_defaults(command=_report)

    for name, verb in verbs.choices.items():
        if name not in {"all", "quick", "report"}:
            verb.add_argument(
                "--json", type=Path, help="write the result, with every sample and the machine's facts"
            )
    return parser


def _profile_help() -> str:
    return "of " + ", ".join(f"{letter} ({profile.title})" for letter, profile in PROFILES.items())


def _forwarding(arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = set(arguments.variants) | {variants.BASE}
    wanted = forwarding.Wanted(
        networks=arguments.networks,
        variants=[name for name in variants.TITLES if name in chosen],
        profiles=arguments.profiles,
        families=[int(family) for family in arguments.families],
        repetitions=arguments.repetitions,
    )
    return {"forwarding": forwarding.measure(wanted, _say)}


def _whole(arguments: argparse.Namespace) -> dict[str, Any]:
    """All parts; what is there already survives a part that fails or an impatient reader."""
    extent: suite.Extent = arguments.extent
    if arguments.networks:
        extent = dataclasses.replace(extent, networks=arguments.networks, control_networks=arguments.networks)
    if arguments.repetitions:
        extent = dataclasses.replace(extent, repetitions=arguments.repetitions)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    result = _new_result()

    def keep(so_far: dict[str, Any]) -> None:
        _write(output / "result.json", so_far)
        (output / "tables.txt").write_text(report.as_text(so_far), encoding="utf-8")

    suite.run(suite.parts(extent, _say), result, keep, _say)
    _draw(result, output, ["svg", "png"])
    return result


def _report(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(arguments.result.read_text(encoding="utf-8"))
    if result.get("format") != FORMAT:
        raise SystemExit(f"{arguments.result}: format {result.get('format')}, this program reads {FORMAT}")
    for page in arguments.page:
        report.write(page, result)
    if arguments.plots:
        _draw(result, arguments.plots, ["svg"])
    return result


def _draw(result: dict[str, Any], folder: Path, suffixes: Sequence[str]) -> None:
    try:
        from tools.bench import plots  # noqa: PLC0415  (only where plots are drawn is matplotlib installed)
    except ImportError as error:
        _say(f"no plots: {error}; `make .stamps/setup-bench` installs what they need")
        return
    for path in plots.draw(result, folder, suffixes):
        _say(f"drew {path}")


def _new_result() -> dict[str, Any]:
    return {"format": FORMAT, "machine": machine.facts()}


def _write(path: Path, result: dict[str, Any]) -> None:
    # What failed may name files; a result is to be read elsewhere.
    root = f"{Path(__file__).parents[2]}/"
    path.write_text(json.dumps(result).replace(root, "") + "\n", encoding="utf-8")


def _end(_signal: int, _frame: FrameType | None) -> None:
    """Let every namespace be removed on the way out."""
    raise SystemExit(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    facts, steal = _new_result(), machine.steal_s()
    result = facts | arguments.command(arguments)
    if arguments.command is not _report:
        result["machine"]["stolen_s"] = round(machine.steal_s() - steal, 2)
        result["machine"]["took_s"] = round(time.monotonic() - _STARTED)
    print(report.as_text(result))
    if getattr(arguments, "output", None):
        _write(arguments.output / "result.json", result)
    if getattr(arguments, "json", None):
        _write(arguments.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
