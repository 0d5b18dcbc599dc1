# SPDX-License-Identifier: Apache-2.0
"""Keep the idle daemon small."""

from __future__ import annotations

import gc


def settle() -> None:
    """After the start: what lives now lives for ever, so the collector need not look at it again."""
    gc.collect()
    gc.freeze()
