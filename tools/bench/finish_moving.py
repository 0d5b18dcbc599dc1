# SPDX-License-Identifier: Apache-2.0
"""In the node's namespace: does without rests what a daemon does in the minutes after a load (`service/mover.py`).

    nsenter --net=... python -m tools.bench.finish_moving STATE_DIR

Devices that were many have tc filters after `datapath apply`; a node that runs the daemon has tcx programs at them a
little later, and that is what packets of such a node cost.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from datapath import log
from datapath.kernel import bpf
from datapath.observe.stats import ServiceStats
from datapath.service.mover import Mover
from datapath.service.timers import Timers
from datapath.state import StateDirectory

#: Of the whole machine.
_RCU_EXPEDITED: Final = Path("/sys/kernel/rcu_expedited")


@contextlib.contextmanager
def hurried() -> Iterator[None]:
    """Short grace periods of RCU meanwhile: each device waits for one. What comes of it is the same, minutes sooner."""
    try:
        before = _RCU_EXPEDITED.read_text()
        _RCU_EXPEDITED.write_text("1")
    except OSError:  # then it takes its time
        yield
        return
    try:
        yield
    finally:
        _RCU_EXPEDITED.write_text(before)


def main() -> int:
    """Move all; 1 where any has still a filter."""
    log.configure()
    mover = Mover(StateDirectory(Path(sys.argv[1])), Timers(), ServiceStats(), lambda _: None)
    mover.follow(bpf.observe_ingress().filtered)
    while mover.left:
        mover.move()
    return 1 if bpf.observe_ingress().filtered else 0


if __name__ == "__main__":
    sys.exit(main())
