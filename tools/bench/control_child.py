# SPDX-License-Identifier: Apache-2.0
"""In the node's namespace: applies policies one after the other in one process, and says how long each took.

    nsenter --net=... python -m tools.bench.control_child STATE_DIR POLICY_DIR ROUNDS

POLICY_DIR has `full.yaml`, `fewer.yaml` (without the last network) and `changed.yaml` (its gateway is another). The
compiled eBPF program comes from the directory named by DATAPATH_BPF_OBJECTS, once the first round, which is not
counted, has put it there. One JSON object on stdout: seconds by operation, and what was compiled in the first round.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from datapath import log
from datapath.cli import GC_OBJECTS
from datapath.controller import Controller
from datapath.policy import LoadedPolicy, load_policy
from datapath.state import StateDirectory

#: Every apply must do something, but the one that must not.
_IDLE = "no-op apply"
#: After so long, the rounds so far will do; one is always counted.
_ENOUGH_S = 60


def _delete_rule() -> None:
    """One of ours, the first that is found."""
    rules = json.loads(subprocess.run(["ip", "-j", "rule"], capture_output=True, check=True).stdout)
    ours = next(rule for rule in rules if rule.get("fwmark") and rule.get("table"))
    subprocess.run(
        ["ip", "rule", "del", "priority", str(ours["priority"]), "fwmark", _fwmark(ours)], check=True
    )


def _fwmark(rule: dict[str, str]) -> str:
    mask = rule.get("fwmask")
    return f"{rule['fwmark']}/{mask}" if mask else rule["fwmark"]


def _timed(times: dict[str, list[float]], name: str, action: Callable[[], int]) -> None:
    began = time.perf_counter()
    steps = action()
    times.setdefault(name, []).append(time.perf_counter() - began)
    if (steps == 0) is not (name == _IDLE):
        raise SystemExit(f"{name}: {steps} steps")


def main() -> int:
    """Serve the one request."""
    state, folder, rounds = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    gc.set_threshold(GC_OBJECTS)
    log.configure()
    controller = Controller(StateDirectory(state))

    def apply(policy: LoadedPolicy) -> int:
        return len(controller.apply(policy).steps)

    result: dict[str, list[float]] = {}
    started = time.perf_counter()
    for number in range(rounds + 1):
        if number > 1 and time.perf_counter() - started > _ENOUGH_S:
            break
        times: dict[str, list[float]] = {}
        began = time.perf_counter()
        full, fewer, changed = (load_policy(folder / f"{name}.yaml") for name in ("full", "fewer", "changed"))
        times["read and check the policy"] = [(time.perf_counter() - began) / 3]
        _timed(times, "load from nothing", partial(apply, full))
        _timed(times, _IDLE, partial(apply, full))
        _timed(times, "remove one network", partial(apply, fewer))
        _timed(times, "add one network", partial(apply, full))
        _timed(times, "change one network", partial(apply, changed))
        apply(full)
        _delete_rule()
        _timed(times, "heal one deleted rule", partial(apply, full))
        _timed(times, "remove everything", lambda: len(controller.teardown()))
        if number == 0:
            result["load from nothing, with eBPF compile"] = times["load from nothing"]
            continue
        for name, values in times.items():
            result.setdefault(name, []).extend(values)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
