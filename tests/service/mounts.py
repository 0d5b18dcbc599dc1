# SPDX-License-Identifier: Apache-2.0
"""A state directory on a file system of its own, which only the processes of one mount namespace see."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

from tests.service.daemon import Node
from tools.lab.netns import Namespace

PAGE = 4096
_SIZE = 64 * PAGE


class _Mounted(Namespace):
    """A network namespace whose programs run in the mount namespace of a process as well."""

    def __init__(self, name: str, pid: int) -> None:
        super().__init__(name)
        self._pid = pid

    def argv(self, *argv: str) -> list[str]:
        return ["nsenter", f"--mount=/proc/{self._pid}/ns/mnt", f"--net={self.path}", *argv]


class MountedNode(Node):
    """A node whose state directory is a tmpfs of a few pages."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.state.mkdir()
        # It holds the mount namespace; everything in it goes with it.
        argv = ["unshare", "--mount", "--propagation", "private", "cat"]
        self._holder = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdin
        assert self._holder.stdout
        self._holder.stdin.write(b"ready\n")
        self._holder.stdin.flush()
        assert self._holder.stdout.readline() == b"ready\n"
        self.ns: Namespace = _Mounted(self.ns.name, self._holder.pid)
        self.mount("-t", "tmpfs", "-o", f"size={_SIZE}", "none", str(self.state))

    def close(self) -> None:
        super().close()
        with self._holder:
            self._holder.kill()

    def mount(self, *arguments: str) -> None:
        """Mount something that only the processes of this node see."""
        subprocess.run(self.ns.argv("mount", *arguments), check=True)

    @property
    def root(self) -> Path:
        """The file system as the processes of this node see it."""
        return Path(f"/proc/{self._holder.pid}/root")

    @property
    def seen(self) -> Path:
        """The state directory, for us who do not see the mount."""
        return self.root / self.state.relative_to("/")

    @property
    def _filler(self) -> Path:
        return self.seen / "filler"

    def fill(self, *, free_pages: int = 0) -> None:
        """Leave so much room; the file that takes the rest is not ours."""
        self.make_room()
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):
                for _ in range(2 * _SIZE // PAGE):
                    os.write(descriptor, bytes(PAGE))
            os.truncate(descriptor, max(0, os.fstat(descriptor).st_size - free_pages * PAGE))
        finally:
            os.close(descriptor)

    def make_room(self) -> None:
        self._filler.unlink(missing_ok=True)

    def read_only(self) -> None:
        self.mount("-o", "remount,bind,ro", str(self.state))

    def writable(self) -> None:
        self.mount("-o", "remount,bind,rw", str(self.state))
