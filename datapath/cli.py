# SPDX-License-Identifier: Apache-2.0
"""The command line: the only place that prints and exits.

Exit status: 0 done or nothing to do, 1 failed, 2 the input is wrong, 3 differences exist.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pydantic

from datapath import log
from datapath.arguments import datapath_parser, dry_run_parser
from datapath.confirmation import confirm, undo, watch
from datapath.controller import Applied, Controller, compile_located
from datapath.errors import DatapathError, InputError
from datapath.facts import Facts, load_facts
from datapath.generations import History
from datapath.plan.model import Plan
from datapath.plan.render import plan_digest, render_plan, render_table
from datapath.policy import load_policy
from datapath.state import StateDirectory

DIFFERENCES = 3
INTERRUPTED = 130
DROPS_S = 10
#: Objects between two looks for cyclic garbage, of which there is next to none here: at Python's 700, looking in vain
#: takes two fifths of the time of a large policy. 50,000 objects are a few MB.
GC_OBJECTS = 50_000


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `datapath`."""
    return _run(datapath_parser().parse_args(argv))


def main_dry_run(argv: Sequence[str] | None = None) -> int:
    """Entry point of `nft-dry-run`."""
    return _run(dry_run_parser().parse_args(argv))


def _run(arguments: argparse.Namespace) -> int:
    gc.set_threshold(GC_OBJECTS)
    log.configure(verbose=arguments.verbose)
    try:
        return _COMMANDS[arguments.command](arguments)
    except DatapathError as error:
        if arguments.json:
            _print_json({"error": str(error), "hint": error.hint})
        print(f"{_program()}: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has seen enough; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _program() -> str:
    return Path(sys.argv[0]).name or "datapath"


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2, sort_keys=True))


def _plan_json(plan: Plan) -> dict[str, Any]:
    body: dict[str, Any] = pydantic.TypeAdapter(Plan).dump_python(plan, mode="json")
    return {"digest": plan_digest(plan), **body}


def _compile(arguments: argparse.Namespace) -> int:
    loaded = load_policy(arguments.policy)
    facts = load_facts(arguments.facts) if arguments.facts else Facts()
    plan = compile_located(loaded, facts)
    if arguments.json or arguments.format == "json":
        _print_json(_plan_json(plan))
    elif arguments.format == "nft":
        print(render_table(plan.table) if plan.table else "# no nftables table is needed\n", end="")
    else:
        print(render_plan(plan), end="")
    return 0


def _apply(arguments: argparse.Namespace) -> int:
    loaded = load_policy(arguments.policy)
    controller = Controller(StateDirectory(arguments.state_dir))
    applied = controller.apply(loaded, confirm_s=arguments.confirm)
    _print_applied(applied, as_json=arguments.json)
    if arguments.confirm and applied.steps and not arguments.json:
        print(f"goes back by itself in {arguments.confirm:g} s unless `datapath confirm` comes")
    return 0


def _print_applied(applied: Applied, *, as_json: bool) -> None:
    steps = [step.describe() for step in applied.steps]
    notes = [note.render() for note in (*applied.plan.notes, *applied.warnings)]
    if as_json:
        _print_json(
            {"changed": bool(steps), "generation": applied.generation, "steps": steps, "notes": notes}
        )
        return
    for note in notes:
        print(note)
    if not steps:
        print("nothing to do: the kernel is as the policy says")
    else:
        for text in steps:
            print(f"  {text}")
        print(f"applied generation {applied.generation}: {len(steps)} step(s), verified")


def _confirm(arguments: argparse.Namespace) -> int:
    generation = confirm(StateDirectory(arguments.state_dir))
    if arguments.json:
        _print_json({"generation": generation})
    else:
        print(f"generation {generation} is kept")
    return 0


def _rollback(arguments: argparse.Namespace) -> int:
    directory = StateDirectory(arguments.state_dir)
    # Nobody is there to set a device up when the clock has run out.
    controller = Controller(directory, wait_for_devices=bool(arguments.unconfirmed))
    if arguments.unconfirmed:
        end = watch if arguments.wait else undo
        end(directory, controller, arguments.unconfirmed)
        return 0
    _print_applied(controller.rollback(arguments.generation), as_json=arguments.json)
    return 0


def _history(arguments: argparse.Namespace) -> int:
    history = History(StateDirectory(arguments.state_dir))
    numbers = history.numbers() if arguments.generation is None else [arguments.generation]
    generations = [history.get(number) for number in numbers]
    if arguments.json:
        _print_json([item.as_json() | {"diff": history.diff(item.number)} for item in generations])
        return 0
    for item in generations:
        print(f"generation {item.number}, {item.applied_at}, {item.policy_name}")
        print(history.diff(item.number) or "  the same policy, applied again\n", end="")
    if arguments.generation is not None:
        print(generations[0].plan, end="")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from datapath.kernel.counters import (  # noqa: PLC0415  (libbpf is loaded only where it is needed)
        read_counters,
        read_steered,
    )
    from datapath.kernel.egress import read_counters as read_egress  # noqa: PLC0415
    from datapath.kernel.observer import tables_of_others  # noqa: PLC0415
    from datapath.observe.status import make_status  # noqa: PLC0415

    drift = Controller(StateDirectory(arguments.state_dir)).status()
    if drift is None:
        if arguments.json:
            _print_json({"policy": None})
        else:
            print("no policy is in force in this namespace")
        return 0
    status = make_status(
        drift.plan,
        drift.state,
        drift.steps,
        drift.waiting,
        read_counters(drift.plan),
        actual=dataclasses.replace(drift.actual, foreign_tables=tables_of_others(drift.plan)),
        steered=read_steered(drift.plan),
        opened=read_egress(drift.plan.egress),
    )
    if arguments.json:
        _print_json(status.as_json())
    else:
        print(status.render())
    return DIFFERENCES if status.drift else 0


def _run_daemon(arguments: argparse.Namespace) -> int:
    from datapath.service import run_service  # noqa: PLC0415  (only the daemon needs it)

    run_service(arguments.policy, arguments.policy_dir, arguments.state_dir, arguments.metrics)
    return 0


def _drops(arguments: argparse.Namespace) -> int:
    from datapath.observe.drops import watch_drops  # noqa: PLC0415  (libbpf is loaded only where it is needed)

    drift = Controller(StateDirectory(arguments.state_dir)).status()
    if drift is None:
        raise InputError("no policy is in force in this namespace", hint="apply one first")
    for report in watch_drops(drift.plan, None if arguments.follow else DROPS_S):
        print(json.dumps(report.as_json()) if arguments.json else report.render(), flush=True)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from datapath.observe.doctor import examine  # noqa: PLC0415  (libbpf is loaded only where it is needed)

    loaded = load_policy(arguments.policy) if arguments.policy else None
    report = examine(StateDirectory(arguments.state_dir), loaded)
    if arguments.json:
        _print_json(report.as_json())
    else:
        print(report.render())
    return 1 if report.has_failed else 0


def _egress(arguments: argparse.Namespace) -> int:
    from datapath.egress_sets import EgressSets, Verb  # noqa: PLC0415  (libbpf is loaded only where it is needed)

    sets = EgressSets(StateDirectory(arguments.state_dir))
    if arguments.verb == "list":
        found = sets.all()
        if arguments.json:
            _print_json([item.as_json() for item in found])
        else:
            print("\n".join(item.render() for item in found) or "the policy in force has no sets")
        return 0
    if arguments.verb == "get":
        one = sets.get(arguments.name)
    else:
        one = sets.change(arguments.name, Verb(arguments.verb), arguments.addresses)
    if arguments.json:
        _print_json(one.as_json())
    elif arguments.verb == "get":
        print("".join(f"{address}\n" for address in one.as_json()["members"]), end="")
    else:
        print(one.render())
    return 0


def _teardown(arguments: argparse.Namespace) -> int:
    steps = [step.describe() for step in Controller(StateDirectory(arguments.state_dir)).teardown()]
    if arguments.json:
        _print_json({"changed": bool(steps), "steps": steps})
    elif steps:
        for text in steps:
            print(f"  {text}")
        print(f"removed: {len(steps)} step(s), verified")
    else:
        print("nothing to do: nothing of ours is in this namespace")
    return 0


def _restore(arguments: argparse.Namespace) -> int:
    from datapath.service.restore import restore  # noqa: PLC0415  (only the boot unit needs it)

    applied = restore(arguments.state_dir)
    if applied is not None:
        _print_applied(applied, as_json=arguments.json)
    elif arguments.json:
        _print_json({"changed": False})
    else:
        print("nothing to restore")
    return 0


def _facts(arguments: argparse.Namespace) -> int:
    facts = Controller(StateDirectory(arguments.state_dir)).facts()
    if arguments.json:
        _print_json(facts.model_dump(mode="json"))
    else:
        print(facts.dump(), end="")
    return 0


def _dry_run(arguments: argparse.Namespace) -> int:
    from datapath.dryrun import dry_run  # noqa: PLC0415  (needs the kernel's libraries)

    report = dry_run(
        load_policy(arguments.policy),
        load_facts(arguments.facts) if arguments.facts else None,
        StateDirectory(arguments.state_dir),
    )
    if arguments.json:
        _print_json(report.as_json())
    else:
        print(report.render())
    return DIFFERENCES if arguments.exit_code and report.changes else 0


_COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "compile": _compile,
    "apply": _apply,
    "confirm": _confirm,
    "rollback": _rollback,
    "history": _history,
    "status": _status,
    "drops": _drops,
    "doctor": _doctor,
    "teardown": _teardown,
    "egress": _egress,
    "run": _run_daemon,
    "restore": _restore,
    "facts": _facts,
    "dry-run": _dry_run,
}


if __name__ == "__main__":
    sys.exit(main())
