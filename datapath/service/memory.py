# SPDX-License-Identifier: Apache-2.0
"""Keep the idle daemon small."""

from __future__ import annotations

import gc

from datapath.kernel.bpf.image import forget_image
from datapath.kernel.memory import give_back


def settle() -> None:
    """After something large: collect it now, and return what is free to the kernel."""
    forget_image()
    gc.collect()
    give_back()
