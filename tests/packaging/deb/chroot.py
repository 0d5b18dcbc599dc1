# SPDX-License-Identifier: Apache-2.0
"""A minimal Debian 12 in a folder, in a network namespace of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.sources import REPOSITORY
from tools.deb.control import DEPENDS
from tools.lab.netns import Namespace, new_prefix, remove

_CACHE = REPOSITORY / ".cache/deb/bookworm.tar"
#: What changes with every installation, whatever is installed, and what belongs to no package.
_IGNORED = (
    "dev",
    "proc",
    "run/lock",
    "srv",
    "sys",
    "tmp",
    "var/cache",
    "var/lib/apt",
    "var/lib/dpkg",
    "var/log",
)
#: Python's own compiled files of Debian's modules come and go as root uses them.
_IGNORED_NAME = "__pycache__"
_BUILD_TIMEOUT_S = 600


class Chroot:
    """A Debian without the package, but with all that the package depends on."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        subprocess.run(["tar", "-C", str(root), "-xf", str(_base())], check=True)
        # libbpf counts the CPUs; a whole sysfs would have to be unmounted again.
        cpus = "sys/devices/system/cpu/possible"
        (root / cpus).parent.mkdir(parents=True)
        (root / cpus).write_text(Path("/", cpus).read_text())
        self.ns = Namespace(f"{new_prefix()}deb")
        self.ns.create()
        self.ns.ip(
            [
                "link set lo up",
                "link add eth0 type veth peer name p-eth0",
                "link set p-eth0 up",
                "link set eth0 up",
            ]
        )

    def close(self) -> None:
        remove(self.ns.name)

    def run(self, *argv: str, status: int = 0) -> str:
        """Run a program inside; both its streams."""
        done = subprocess.run(
            [
                *("nsenter", f"--net=/var/run/netns/{self.ns.name}"),
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={self.root}/proc"),
                *("chroot", str(self.root), *argv),
            ],
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "LC_ALL": "C.UTF-8",
                "DEBIAN_FRONTEND": "noninteractive",
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == status, f"{argv}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def install(self, package: Path) -> str:
        """As a user does it, without looking for anything elsewhere."""
        inside = self.root / "srv" / package.name
        inside.write_bytes(package.read_bytes())
        inside.chmod(0o644)
        return self.run("apt-get", "install", "-y", "-q", "--no-install-recommends", f"/srv/{package.name}")

    def files(self) -> set[str]:
        """All paths that packages, or we, may be to blame for."""
        found = set()
        for folder, names, files in os.walk(self.root):
            here = os.path.relpath(folder, self.root)
            names[:] = [name for name in names if os.path.normpath(f"{here}/{name}") not in _IGNORED]
            names[:] = [name for name in names if name != _IGNORED_NAME]
            found |= {os.path.normpath(f"{here}/{name}") for name in (*names, *files)}
        return found

    def network(self) -> str:
        """What the kernel says, counters apart."""
        shown = [
            self.ns.run("nft", "-s", "list", "ruleset"),
            self.ns.run("ip", "-4", "rule"),
            self.ns.run("ip", "-6", "rule"),
            self.ns.run("ip", "route", "show", "table", "all", "proto", "78"),
            self.ns.run("tc", "filter", "show", "dev", "eth0", "ingress"),
            self.ns.read_sysctl("net/ipv4/conf/eth0/rp_filter"),
        ]
        return "\n".join(shown)


def _base() -> Path:
    """A tarball with the dependencies, made once and kept."""
    if not _CACHE.exists():
        _CACHE.parent.mkdir(parents=True, exist_ok=True)
        names = sorted({dependency.split()[0] for dependency in DEPENDS} | {"systemd"})
        unfinished = _CACHE.with_suffix(".new.tar")
        subprocess.run(
            [
                *("mmdebstrap", "--quiet", "--variant=minbase", "--format=tar"),
                *('--aptopt=Acquire::Languages "none"', f"--include={','.join(names)}"),
                *("bookworm", str(unfinished)),
            ],
            check=True,
            timeout=_BUILD_TIMEOUT_S,
        )
        unfinished.rename(_CACHE)
    return _CACHE
