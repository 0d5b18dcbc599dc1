# SPDX-License-Identifier: Apache-2.0
"""The disk of `make test-systemd`: a Debian with a kernel, systemd, and the package as a user installs it.

Made by mmdebstrap and `mkfs.ext4 -d`: nothing is mounted on this machine.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from datapath import __version__
from tools.deb import topology
from tools.deb.build import REPOSITORY, build
from tools.deb.control import DEPENDS

_CACHE: Final = REPOSITORY / ".cache/deb"
_PACKAGES: Final = (
    "systemd",
    "systemd-sysv",
    "udev",
    "dbus",
    "linux-image-cloud-amd64",
    "initramfs-tools",
)
_UNITS: Final = ("systemd-networkd", "systemd-networkd-wait-online", "nftables", "datapath-check")
#: What runs in the machine.
_GUEST: Final = ("__init__", "guest", "node", "steps", "topology", "traffic")
#: Version of the package that the node is upgraded to.
_NEXT: Final = f"{__version__}-2"
_TIMEOUT_S: Final = 900
_DISK_BYTES: Final = 3 << 30


@dataclass(frozen=True, slots=True)
class Image:
    """What a machine is started from.

    Attributes:
        disk: its root file system.
        kernel: outside of the disk, because nothing in there loads it.
        initrd: for this kernel.
    """

    disk: Path
    kernel: Path
    initrd: Path


def make_image(folder: Path) -> Image:
    """Make a disk in that folder.

    Raises:
        CalledProcessError: a program failed.
        BuildError: the package cannot be built here.
    """
    root = folder / "root"
    root.mkdir()
    _run("tar", "-C", str(root), "-xf", str(_base()))
    _next_version(build(root / "srv", f"{__version__}-1"), folder)
    _copy_guest(root / "srv")
    # In a namespace of its own: maintainer scripts must not see the network of this machine.
    package = f"/srv/datapath_{__version__}-1_amd64.deb"
    _run("unshare", "--net", "chroot", str(root), "dpkg", "-i", package)
    for name, text in topology.files().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    _run("chroot", str(root), "systemctl", "enable", "--quiet", *_UNITS)
    image = Image(folder / "disk", folder / "vmlinuz", folder / "initrd.img")
    for target in (image.kernel, image.initrd):
        (found,) = (root / "boot").glob(f"{target.name}-*")
        shutil.copyfile(found, target)
    with image.disk.open("wb") as file:
        file.truncate(_DISK_BYTES)
    _run("mkfs.ext4", "-q", "-d", str(root), str(image.disk))
    shutil.rmtree(root)
    return image


def _base() -> Path:
    """A Debian with all that the package depends on; made once for each list of packages, and kept."""
    names = ",".join(sorted({dependency.split()[0] for dependency in DEPENDS} | set(_PACKAGES)))
    kept = _CACHE / f"bookworm-vm-{hashlib.sha256(names.encode()).hexdigest()[:8]}.tar"
    if not kept.exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(".new.tar")
        argv = ["mmdebstrap", "--quiet", "--variant=minbase", "--format=tar"]
        argv += ['--aptopt=Acquire::Languages "none"', f"--include={names}"]
        _run(*argv, "bookworm", str(unfinished))
        unfinished.rename(kept)
    return kept


def _next_version(package: Path, folder: Path) -> None:
    """The same package with a higher version, beside it: what an upgrade does to a node is all the same."""
    tree = folder / "next"
    _run("dpkg-deb", "--raw-extract", str(package), str(tree))
    control = tree / "DEBIAN/control"
    text = control.read_text(encoding="utf-8")
    control.write_text(text.replace(f"Version: {__version__}-1\n", f"Version: {_NEXT}\n"), encoding="utf-8")
    target = package.with_name(package.name.replace(f"{__version__}-1", _NEXT))
    _run("dpkg-deb", "--root-owner-group", "-Znone", "--build", str(tree), str(target))
    shutil.rmtree(tree)


def _copy_guest(folder: Path) -> None:
    """As the package it is here, so that both sides import the same names."""
    package = folder / "tools/deb"
    package.mkdir(parents=True)
    (folder / "tools/__init__.py").touch()
    for name in _GUEST:
        shutil.copyfile(Path(__file__).with_name(f"{name}.py"), package / f"{name}.py")


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True, timeout=_TIMEOUT_S)
