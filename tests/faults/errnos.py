# SPDX-License-Identifier: Apache-2.0
"""What an operation is refused with, on the fake kernel as on the running one."""

from __future__ import annotations

import errno
from typing import Final

#: What the kernel plausibly says to any netlink, bpf or /proc operation.
ERRNOS: Final = (
    errno.ENOMEM,
    errno.EBUSY,
    errno.EEXIST,
    errno.ENOENT,
    errno.EPERM,
    errno.ENOBUFS,
    errno.ETIMEDOUT,
)
