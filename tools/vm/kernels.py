# SPDX-License-Identifier: Apache-2.0
"""Debian's kernel images, unpacked beside each other; the boot loader of this machine never hears of them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Kernel series -> the Debian 12 package that depends on its newest image.
SERIES: Final = {
    "6.1": "linux-image-amd64",
    "6.12": "linux-image-6.12-amd64",
}


class KernelError(Exception):
    """Debian's archive, as this machine sees it, has no such kernel image."""


@dataclass(frozen=True, slots=True)
class KernelImage:
    """An unpacked kernel image.

    Attributes:
        series: the first two numbers of its version, such as "6.1".
        release: what `uname -r` says once it runs.
        folder: holds boot/vmlinuz-RELEASE and lib/modules/RELEASE.
    """

    series: str
    release: str
    folder: Path

    @property
    def vmlinuz(self) -> Path:
        """The image to boot."""
        return self.folder / "boot" / f"vmlinuz-{self.release}"

    @property
    def _module_index(self) -> Path:
        return self.folder / "lib" / "modules" / self.release / "modules.dep"

    @property
    def complete(self) -> bool:
        """Whether it can boot and load modules."""
        return self.vmlinuz.is_file() and self._module_index.is_file()


def fetch(series: str, cache: Path) -> KernelImage:
    """Give the newest image of a series, from the cache or from Debian's archive.

    Raises:
        KernelError: apt knows no such package, or cannot download it.
    """
    package = _concrete_package(SERIES[series])
    release = package.removeprefix("linux-image-")
    image = KernelImage(series, release, cache / release)
    if not image.complete:
        print(f"vm: downloading {package}", flush=True)
        shutil.rmtree(image.folder, ignore_errors=True)
        _unpack(package, image)
    return image


def _concrete_package(meta_package: str) -> str:
    for attempt in ("with the package lists at hand", "after apt-get update"):
        if attempt == "after apt-get update":
            _run("apt-get", "update", "-q")
        answer = subprocess.run(
            ["apt-cache", "depends", "--no-recommends", "--no-suggests", meta_package],
            capture_output=True,
            text=True,
            check=False,
        )
        if match := re.search(r"Depends: (linux-image-\d\S+)", answer.stdout):
            return match[1]
    raise KernelError(f"apt knows no kernel image behind {meta_package}: are Debian 12's sources configured?")


def _unpack(package: str, image: KernelImage) -> None:
    image.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=image.folder.parent) as scratch:
        # The sandbox user of apt may not enter this folder.
        _run("apt-get", "download", "-q", "-o", "APT::Sandbox::User=root", package, cwd=scratch)
        tree = Path(scratch) / "tree"
        (archive,) = Path(scratch).glob("*.deb")
        _run("dpkg", "-x", str(archive), str(tree))
        # The package's post-installation script would do this for the running system.
        _run("depmod", "-b", str(tree), image.release)
        tree.rename(image.folder)
    if not image.complete:
        raise KernelError(f"{package} holds no vmlinuz and modules of {image.release}")


def _run(*command: str, cwd: str | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise KernelError(f"{' '.join(command)}: {result.stderr.strip()}")
