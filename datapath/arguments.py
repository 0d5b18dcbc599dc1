# SPDX-License-Identifier: Apache-2.0
"""What the two programs take on their command lines. What they do with it is in cli.py."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from datapath import __version__
from datapath.state import DEFAULT_DIRECTORY

CONFIRM_MAX_S = 86_400


def datapath_parser() -> argparse.ArgumentParser:
    """Of `datapath`; the result's `command` is the name of the verb."""
    parser = argparse.ArgumentParser(
        prog="datapath", description="Replies leave by the network their requests came in on."
    )
    parser.add_argument("--version", action="version", version=f"datapath {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    compile_ = _verb(verbs, "compile", "print what a policy compiles to; needs no root and no kernel")
    _add_policy(compile_)
    _add_facts(compile_)
    compile_.add_argument("--format", choices=("nft", "plan", "json"), default="plan", help="default: plan")

    apply = _verb(verbs, "apply", "make this namespace as the policy says, or leave it as it is")
    _add_policy(apply)
    _add_state(apply)
    apply.add_argument(
        "--confirm",
        type=_seconds,
        metavar="SECONDS",
        help="go back by itself after SECONDS unless `datapath confirm` comes",
    )

    confirm = _verb(verbs, "confirm", "keep the change that waits for confirmation")
    _add_state(confirm)

    rollback = _verb(verbs, "rollback", "go back to an earlier policy")
    rollback.add_argument(
        "generation", type=int, nargs="?", help="default: the one before the present policy"
    )
    rollback.add_argument("--unconfirmed", metavar="TOKEN", help=argparse.SUPPRESS)
    rollback.add_argument("--wait", action="store_true", help=argparse.SUPPRESS)
    _add_state(rollback)

    history = _verb(verbs, "history", "show past policies and what each of them changed")
    history.add_argument("generation", type=int, nargs="?", help="show only this one, with its compiled plan")
    _add_state(history)

    status = _verb(verbs, "status", "show networks, ids, counters and drift (exit 3 on drift)")
    _add_state(status)

    drops = _verb(verbs, "drops", "show dropped packets and why, as they happen")
    drops.add_argument("--follow", action="store_true", help="until interrupted, instead of for 10 seconds")
    _add_state(drops)

    doctor = _verb(
        verbs, "doctor", "show what on this node stands in the way, and what to do (exit 1 on fail)"
    )
    doctor.add_argument("policy", type=Path, nargs="?", help="to be applied here; default: the one in force")
    _add_state(doctor)

    teardown = _verb(verbs, "teardown", "remove everything of ours and put back what was there")
    _add_state(teardown)

    egress = verbs.add_parser("egress", help="the sets of `egress`: whose connections leave by a network")
    _add_egress(egress.add_subparsers(title="commands", required=True, metavar="COMMAND"))

    run = _verb(verbs, "run", "the daemon: apply, watch, heal; SIGHUP reloads, SIGTERM changes nothing")
    _add_policy(run)
    run.add_argument(
        "--policy-dir", type=Path, metavar="DIR", help="drop-in files (*.yaml) with further networks"
    )
    run.add_argument(
        "--metrics", metavar="WHERE", help="serve Prometheus metrics at 127.0.0.1:PORT or unix:PATH"
    )
    _add_state(run)

    restore = _verb(verbs, "restore", "at boot: put the last good policy in force again")
    _add_state(restore)

    facts = _verb(verbs, "facts", "print what the compiler knows of this host, for `compile --facts`")
    _add_state(facts)
    return parser


def _add_egress(verbs: Any) -> None:
    for name, text in (
        ("list", "show every set"),
        ("get", "print the members of a set, one a line"),
        ("set", "these are the members, and no others"),
        ("add", "these are members, too"),
        ("remove", "these are members no more; their open connections go on"),
    ):
        parser = _verb(verbs, name, text)
        if name != "list":
            parser.add_argument("name", metavar="NAME", help="of the entry of `egress`, with `set: true`")
        if name in ("set", "add", "remove"):
            many = "*" if name == "set" else "+"
            parser.add_argument("addresses", nargs=many, metavar="ADDRESS", help="an address or a prefix")
        parser.set_defaults(command="egress", verb=name)
        _add_state(parser)


def dry_run_parser() -> argparse.ArgumentParser:
    """Of `nft-dry-run`."""
    parser = argparse.ArgumentParser(
        prog="nft-dry-run",
        description="Compile a policy, let nft, the kernel and the eBPF verifier check it, and show what it would"
        " change here. Nothing is changed. Works without root, in a namespace of its own.",
    )
    parser.add_argument("--version", action="version", version=f"datapath {__version__}")
    _add_common(parser)
    _add_policy(parser)
    _add_facts(parser)
    _add_state(parser)
    parser.add_argument("--exit-code", action="store_true", help="exit 3 if something would change")
    parser.set_defaults(command="dry-run")
    return parser


def _verb(verbs: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    _add_common(parser)
    parser.set_defaults(command=name)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="log every step")


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", type=Path, help="the policy file")


def _add_facts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--facts", type=Path, help="facts of a host from a file, instead of this host's")


def _add_state(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=DEFAULT_DIRECTORY,
        help=f"one for each network namespace; default: {DEFAULT_DIRECTORY}",
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds <= CONFIRM_MAX_S:
        raise argparse.ArgumentTypeError(f"must be 1 to {CONFIRM_MAX_S} seconds")
    return seconds
