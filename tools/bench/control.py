# SPDX-License-Identifier: Apache-2.0
"""The control plane: what it takes to load, check, change and heal, against the classic recipe on the same networks."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from tools.bench import plan, variants
from tools.bench.daemon import Daemon, DaemonError
from tools.bench.ground import Ground, Site, default_by, site
from tools.bench.programs import loaded
from tools.lab import classic
from tools.lab.netns import LabError
from tools.lab.topology import FAMILIES

_TIMEOUT_S: Final = 900
_POLL_S: Final = 0.0005
_SINGLE_ROUNDS: Final = 3
#: Of the commands that are run alone.
_TABLE: Final = 999
TOOLS: Final[tuple[classic.Tool, ...]] = ("iptables-legacy", "iptables-nft")

Say = Callable[[str], None]
Times = dict[str, list[float]]


class ControlError(Exception):
    """An operation failed; the text is what it said."""


def write_policies(folder: Path, count: int, backend: str) -> None:
    """`full`, `fewer` and `changed`, as control_child.py wants them."""
    full = plan.policy(range(1, count + 1), backend=backend)
    gateway = plan.network(count).gateway.v4
    (folder / "full.yaml").write_text(full, encoding="utf-8")
    (folder / "changed.yaml").write_text(full.replace(f"[{gateway}, ", f"[{gateway + 1}, "), encoding="utf-8")
    # A policy has at least one network: with one network only, another one takes its place.
    fewer = full if count > 1 else full.replace(f"eth0.{count},", f"{plan.POD_DEVICE},")
    if count > 1:
        fewer = plan.policy(range(1, count), backend=backend)
    (folder / "fewer.yaml").write_text(fewer, encoding="utf-8")


def ours(built: Ground, backend: str, rounds: int, objects: Path) -> Times:
    """Every operation in one process, without the start of Python and the eBPF compiler."""
    folder = built.files / f"control-{backend}"
    folder.mkdir()
    write_policies(folder, len(built.networks), backend)
    argv = [
        sys.executable,
        "-m",
        "tools.bench.control_child",
        str(folder / "state"),
        str(folder),
        str(rounds),
    ]
    done = subprocess.run(
        built.node.argv(*argv),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
        env={**os.environ, "DATAPATH_BPF_OBJECTS": str(objects)},
    )
    if done.returncode != 0:
        raise ControlError((done.stderr.strip().splitlines() or ["no output"])[-1])
    result: Times = json.loads(done.stdout.splitlines()[-1])
    return result


def daemon(built: Ground, backend: str, rounds: int, objects: Path) -> Times:
    """Start to a working datapath, from nothing and with everything there; file event to kernel; heal."""
    times: Times = {}
    folder = built.files / f"control-{backend}"
    policy = folder / "daemon.yaml"
    full, fewer = ((folder / f"{name}.yaml").read_text(encoding="utf-8") for name in ("full", "fewer"))

    def timed(name: str) -> contextlib.AbstractContextManager[None]:
        return _timed(times, name)

    def started() -> Daemon:
        log = built.files / f"daemon-{time.monotonic_ns()}.log"
        environment = {"DATAPATH_BPF_OBJECTS": str(objects)}
        return Daemon(built.node, policy, folder / "daemon", log=log, environment=environment)

    policy.write_text(full, encoding="utf-8")
    for name in ("daemon: start from nothing", "daemon: start, datapath is there"):
        with timed(name), started() as running:
            running.wait_for("service_started", _TIMEOUT_S, poll_s=_POLL_S)
    with started() as running:
        running.wait_for("service_started", _TIMEOUT_S, poll_s=_POLL_S)
        for _ in range(rounds):
            for name, text in (("daemon: remove one network", fewer), ("daemon: add one network", full)):
                scratch = policy.with_suffix(".new")
                scratch.write_text(text, encoding="utf-8")
                running.rest()
                with timed(name):
                    scratch.replace(policy)
                    running.wait_for("policy_in_force", _TIMEOUT_S, poll_s=_POLL_S)
    state = str(folder / "daemon")
    built.node.run(sys.executable, "-m", "datapath", "teardown", "--state-dir", state)
    return times


@contextlib.contextmanager
def _timed(times: Times, name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    times.setdefault(name, []).append(time.perf_counter() - began)


def _commands(tool: str, built: Ground) -> list[list[str]]:
    """The recipe's commands of the last network, one process each."""
    network = plan.network(built.networks[-1])
    number = len(built.networks)
    commands = []
    for family in FAMILIES:
        program = tool if family == 4 else tool.replace("iptables", "ip6tables")
        prefix, device = network.prefixes[family], network.device
        mangle = f"-t mangle -A PREROUTING -i {device} -j MARK --set-mark {0x100 * number:#x}"
        raw = f"-t raw -A PREROUTING -i {device}"
        commands += [
            f"{program} {mangle}",
            f"{program} {raw} -d {prefix} -j RETURN",
            f"{program} {raw} -m rpfilter --invert -j DROP",
            f"ip -{family} route replace {prefix} dev {device} table {_TABLE}",
            f"ip -{family} route replace default via {network.gateway.get(family)} dev {device} table {_TABLE}",
            f"ip -{family} rule add from {prefix} fwmark {0x100 * number:#x} lookup {_TABLE} priority 900",
        ]
    return [command.split() for command in commands]


def recipe(built: Ground, tool: classic.Tool) -> Times:
    """The classic recipe on the same networks: all at once, then the commands of one more network."""
    times: Times = {}
    networks = [plan.network(number) for number in built.networks]
    commands = _commands(tool, built)
    alone = _run_all(built, commands)
    for program in (tool, tool.replace("iptables", "ip6tables")):
        for table in ("mangle", "raw"):
            built.node.run(program, "-t", table, "-F")
    with _timed(times, "load from nothing (restore, ip -batch)"):
        classic.apply_to(built.node, networks, tool, first_table=1000)
    more = [_run_all(built, commands) for _ in range(_SINGLE_ROUNDS)]
    times[f"add one network ({len(commands)} commands)"] = more
    # A command costs more the more is there: half-way between the first network and the last.
    times["load from nothing, one by one (estimated)"] = [(alone + min(more)) / 2 * len(networks)]
    return times


def _run_all(built: Ground, commands: Sequence[Sequence[str]]) -> float:
    for family in FAMILIES:
        with contextlib.suppress(LabError):
            built.node.run("ip", f"-{family}", "rule", "del", "priority", "900")

    def run() -> float:
        began = time.perf_counter()
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began

    return built.node.call(run)


def measure(
    counts: Sequence[int], rounds: int, say: Say, *, backends: Sequence[str] = ("ebpf", "nft")
) -> dict[str, Any]:
    """All of it at each number of networks; the result as it is written to JSON."""
    rows: list[dict[str, Any]] = []

    def add(who: str, count: int, action: Callable[[], Times]) -> None:
        try:
            found: dict[str, Any] = {"times": action()}
        except (
            ControlError,
            DaemonError,
            LabError,
            subprocess.SubprocessError,
            variants.UnavailableError,
        ) as error:
            found = {"times": {}, "problem": str(error)[:400]}
        rows.append({"who": who, "networks": count, **found})
        say(f"control plane: {who}, {count} networks{': ' + found['problem'] if 'problem' in found else ''}")

    with loaded() as programs:
        for count in counts:
            with site(programs) as built:
                objects = built.directory("objects")
                for backend in backends:
                    node = _node(built, count)
                    add(f"datapath, {backend}", count, partial(ours, node, backend, rounds, objects))
                    add(f"datapath, {backend}", count, partial(daemon, node, backend, rounds, objects))
                for tool in TOOLS:
                    node = _node(built, count)
                    add(f"classic, {tool}", count, partial(recipe, node, tool))
    return {"rounds": rounds, "rows": rows}


def _node(built: Site, count: int) -> Ground:
    ground = built.ground(count, all_devices=True)
    default_by(ground, "default")
    return ground
