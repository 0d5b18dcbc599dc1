# SPDX-License-Identifier: Apache-2.0
"""How much longer than on real hardware a probe waits: emulated machines are that much slower."""

from __future__ import annotations

import os
from typing import Final

#: Every wait of the lab is multiplied by this. The variable is set in the machines of `make test-vm`.
PATIENCE: Final = 8.0 if "DATAPATH_VM_KERNEL" in os.environ else 1.0
