# SPDX-License-Identifier: Apache-2.0
"""Runs inside the virtual machine: python -m tools.vm.guest RESULTS RELEASE PYTEST-OPTION..."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

MARKER: Final = Path(__file__).with_name("written-by-the-guest")
#: Folder of compiled programs, below the one shared with the host.
OBJECTS: Final = "objects"


def main() -> int:
    """Run pytest, its output and exit status as files in the folder shared with the host."""
    shared, release, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    # The host looks for this after power off: it must not be there.
    MARKER.touch()
    environment = {
        **os.environ,
        # Tells the tests what kernel they were promised, and that they run in a machine (tests/conftest.py).
        "DATAPATH_VM_KERNEL": release,
        "DATAPATH_CI": "1",
        "DATAPATH_BPF_OBJECTS": str(shared / OBJECTS),
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/tmp",  # noqa: S108 - the guest's own memory
        "PYTHONUNBUFFERED": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        f"--junitxml={shared}/junit.xml",
        "-p",
        "no:cacheprovider",
        *options,
    ]
    with (shared / "pytest.log").open("ab") as log:
        status = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False
        ).returncode
    (shared / "status").write_text(str(status), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
