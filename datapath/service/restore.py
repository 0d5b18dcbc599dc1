# SPDX-License-Identifier: Apache-2.0
"""The policy of the boot before, put in force again before the network is there.

It comes from the state directory, not from the policy files: these may be wrong, and a policy that somebody rolled
back to is not in them.
"""

from __future__ import annotations

from pathlib import Path

from datapath.confirmation import undo
from datapath.controller import Applied, Controller
from datapath.generations import History
from datapath.kernel.guardian import is_overdue
from datapath.policy import parse_policy
from datapath.probing import ProbeUse
from datapath.state import StateDirectory


def restore(state: Path) -> Applied | None:
    """Put the last good policy in force; devices that are not there yet may come later.

    A change that waited for its confirmation when the machine went down is not good: the one before it is restored.
    The same in this boot if nobody was there when its time was up.

    Returns:
        None where a policy is in force already, or none ever was.

    Raises:
        DatapathError: it cannot be read, or not be put in force.
    """
    directory = StateDirectory(state)
    last = directory.load()
    controller = Controller(directory, wait_for_devices=True)
    if last.pending is not None and is_overdue(last.pending):
        return undo(directory, controller, last.pending.token)
    if last.policy or last.generation == 0:
        return None
    kept = History(directory).get(last.generation)
    loaded = parse_policy(kept.policy.encode(), kept.policy_name)
    return controller.apply(loaded, probes=ProbeUse.SKIP)
