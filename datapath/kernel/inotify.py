# SPDX-License-Identifier: Apache-2.0
"""inotify(7) on directories: whatever way a file is saved, its directory says so."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)
_CLOSE_WRITE, _ATTRIB, _MOVED, _CREATE, _DELETE, _SELF_GONE = (
    0x8,
    0x4,
    0x40 | 0x80,
    0x100,
    0x200,
    0x400 | 0x800,
)
#: Not IN_MODIFY: a file that is still being written is nobody's policy. IN_CREATE is for new symbolic links.
_MASK: Final = _CLOSE_WRITE | _ATTRIB | _MOVED | _CREATE | _DELETE | _SELF_GONE
_ONLY_DIRECTORIES: Final = 0x01000000


class DirectoryWatch:
    """Tells that something changed in one of some directories; what it was, the caller sees for itself."""

    def __init__(self) -> None:
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)

    def watch(self, directories: frozenset[Path]) -> None:
        """Watch these as well; one that is watched already, or is not there, is no error."""
        for directory in directories:
            _libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK | _ONLY_DIRECTORIES)

    def drain(self) -> None:
        """Take all events, so that the next one wakes the loop again."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self._fd, 65_536):
                pass
