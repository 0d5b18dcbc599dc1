# SPDX-License-Identifier: Apache-2.0
"""Whether somebody has a file open for writing, asked with a lease (fcntl(2)): the kernel gives none on such a file."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path


def is_being_written(path: Path) -> bool:
    """Whether a process has the file open for writing now.

    False also where that cannot be told: there is no such file, it belongs to another user, or its file system
    knows no leases.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # Whoever opens it between the next two lines makes the kernel send a signal, which would end us were it SIGIO.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    finally:
        os.close(descriptor)
    return False
