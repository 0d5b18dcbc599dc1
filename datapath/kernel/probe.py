# SPDX-License-Identifier: Apache-2.0
"""Try what a policy wants tried: side by side, each as often and as long as it says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from datapath.errors import KernelError
from datapath.kernel.probe_neighbour import ask_gateway
from datapath.kernel.probe_tcp import connect, get
from datapath.plan.probe import ProbeKind, ProbeTask

#: Tries once, until the given time of the monotonic clock; what was seen instead of success, or "".
Attempt = Callable[[ProbeTask, float], str]

_ATTEMPTS: dict[ProbeKind, Attempt] = {
    ProbeKind.GATEWAY: ask_gateway,
    ProbeKind.TCP: connect,
    ProbeKind.HTTP: get,
}


def run_probes(tasks: Iterable[ProbeTask]) -> dict[str, str]:
    """Try all of them at once, in the network namespace of this thread.

    Returns:
        what was seen, by name of each that failed; empty where all work.
    """
    todo = tuple(tasks)
    seen: dict[str, str] = {}

    def run(task: ProbeTask) -> None:
        seen[task.name] = _run(task)

    # Daemons, so that an interrupted apply need not wait for their last attempt.
    threads = [threading.Thread(target=run, args=(task,), daemon=True) for task in todo]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One that ended with a trace has left nothing: not knowing is failing.
    results = {task.name: seen.get(task.name, "the probe itself broke: see the trace") for task in todo}
    return {name: text for name, text in results.items() if text}


def _run(task: ProbeTask) -> str:
    """Attempts begin one timeout apart: what is refused at once may be there a moment later."""
    began = time.monotonic()
    text = ""
    for attempt in range(task.attempts):
        begins = began + attempt * task.timeout_s
        time.sleep(max(0.0, begins - time.monotonic()))
        try:
            text = _ATTEMPTS[task.kind](task, begins + task.timeout_s)
        except TimeoutError:
            text = f"no answer within {task.timeout_s} s"
        except (OSError, KernelError) as error:
            text = (getattr(error, "strerror", None) or str(error)).lower()
        if not text:
            return ""
    return f"{text} ({task.attempts} attempts)" if task.attempts > 1 else text
