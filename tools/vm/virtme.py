# SPDX-License-Identifier: Apache-2.0
"""`virtme-run` with a root file system that the guest may cache: python -m tools.vm.virtme OPTION...

virtme mounts the host's files by 9p without any cache, so each start of a program reads it anew, which took most of a
run's time. They are a read-only snapshot to the guest, so nothing is lost by keeping what was read.
"""

from __future__ import annotations

import importlib
import sys
from typing import Final

_AS_IT_IS: Final = "msize=524288 /dev/root"
_CACHED: Final = "msize=524288,cache=loose /dev/root"


def main() -> int:
    """What the command of that name does."""
    initramfs = importlib.import_module("virtme.mkinitramfs")
    script: str = initramfs._MOUNT_ROOT_HOST  # noqa: SLF001 - there is no option for it
    if script.count(_AS_IT_IS) != 1:
        print("vm: virtme mounts its root in another way now: not cached", file=sys.stderr)
    vars(initramfs)["_MOUNT_ROOT_HOST"] = script.replace(_AS_IT_IS, _CACHED)
    status: int | None = importlib.import_module("virtme.commands.run").main()
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
