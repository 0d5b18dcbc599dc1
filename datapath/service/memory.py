# SPDX-License-Identifier: Apache-2.0
"""Keep the idle daemon small."""

from __future__ import annotations

import gc

from datapath.kernel.bpf.image import forget_image
from datapath.kernel.memory import give_back
from datapath.kernel.rtnl_dump import forget_facts
from datapath.reconcile.unchanged import forget_unchanged


def settle() -> None:
    """After something large: collect it now, and return what is free to the kernel.

    What is left lives long: it is not looked at again for garbage until the next time.
    """
    forget_image()
    forget_facts()
    forget_unchanged()
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    give_back()
