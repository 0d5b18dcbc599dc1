# SPDX-License-Identifier: Apache-2.0
"""In the node's namespace: does without rests what a daemon does in the minutes after a load (`service/mover.py`).

    nsenter --net=... python -m tools.bench.finish_moving STATE_DIR

Devices that were many have tc filters after `datapath apply`; a node that runs the daemon has tcx programs at them a
little later, and that is what packets of such a node cost.
"""

from __future__ import annotations

import sys
from pathlib import Path

from datapath import log
from datapath.kernel import bpf
from datapath.observe.stats import ServiceStats
from datapath.service.mover import Mover
from datapath.service.timers import Timers
from datapath.state import StateDirectory


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
