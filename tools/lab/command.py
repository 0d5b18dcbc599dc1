# SPDX-License-Identifier: Apache-2.0
"""Runs the product's own command inside the lab's node."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tools.lab.lab import Lab
from tools.lab.netns import LabError


def program() -> str:
    """Return the `datapath` command that belongs to this interpreter, or the one on PATH.

    Raises:
        LabError: there is none.
    """
    beside = Path(sys.executable).with_name("datapath")
    found = str(beside) if beside.exists() else shutil.which("datapath")
    if not found:
        raise LabError("no `datapath` command: install the package into this environment first (make setup)")
    return found


def datapath(lab: Lab, state: Path, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one verb in the node's namespace, with a state directory of its own."""
    argv = lab.node.argv(program(), verb, *arguments, "--state-dir", str(state))
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def apply(lab: Lab, state: Path, policy: str) -> str:
    """Apply a policy text and return what was printed.

    Raises:
        LabError: the command failed.
    """
    state.mkdir(parents=True, exist_ok=True)
    path = state / "policy.yaml"
    path.write_text(policy)
    return _checked(datapath(lab, state, "apply", str(path)))


def teardown(lab: Lab, state: Path) -> str:
    """Remove everything of ours and return what was printed.

    Raises:
        LabError: the command failed.
    """
    return _checked(datapath(lab, state, "teardown"))


def _checked(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode != 0:
        raise LabError(f"{' '.join(done.args)}: exit status {done.returncode}\n{done.stderr}{done.stdout}")
    return done.stdout
