# SPDX-License-Identifier: Apache-2.0
"""From the repository to a .deb: a tree of files, their modes, and dpkg-deb.

The Python dependencies are newer than Debian 12's, so the package carries them, in a virtual environment of its own in
/usr/lib/datapath that sees Debian's modules, too: nftables and bcc exist only there. It is a real environment because
datapath starts its own interpreter again (`sys.executable -m datapath`).
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from datapath import __version__
from tools.deb.control import CONFFILES, checksums, control

REPOSITORY: Final = Path(__file__).resolve().parents[2]
_REQUIREMENTS: Final = Path(__file__).with_name("requirements.txt")
_HOME: Final = Path("usr/lib/datapath")
_SITE: Final = _HOME / "lib/python3.11/site-packages"
_DOC: Final = Path("usr/share/doc/datapath")
_MAINTAINER_SCRIPTS: Final = ("postinst", "prerm", "postrm")
_PROGRAMS: Final = {"datapath": "main", "nft-dry-run": "main_dry_run"}
#: In the repository -> in the package; folders with all that is in them.
_FILES: Final = {
    "packaging/systemd": "lib/systemd/system",
    "packaging/tmpfiles.d": "usr/lib/tmpfiles.d",
    "packaging/sysctl.d": "etc/sysctl.d",
    "packaging/networkd.conf.d": "usr/lib/systemd/networkd.conf.d",
    "packaging/default": "etc/default",
    "packaging/grafana": "usr/share/datapath/grafana",
    "packaging/debian/copyright": f"{_DOC}/copyright",
    "docs/operating.md": f"{_DOC}/operating.md",
    "docs/daemon.md": f"{_DOC}/daemon.md",
    "docs/policy.md": f"{_DOC}/policy.md",
    "docs/policy.schema.json": "usr/share/datapath/policy.schema.json",
    "rulesets/case-4-conntrack/policy.yaml": f"{_DOC}/examples/policy.yaml",
}
#: Needed while building wheels' files only; the first also holds this machine's paths.
_NOT_SHIPPED: Final = ("direct_url.json", "RECORD", "INSTALLER", "REQUESTED")


class BuildError(Exception):
    """The package cannot be built here."""


def package_version() -> str:
    """Version of the package: that of datapath, first Debian revision."""
    return f"{__version__}-1"


def build(out: Path, version: str) -> Path:
    """Write the package.

    Args:
        out: folder; made if missing.
        version: as Debian writes versions.

    Returns:
        the .deb.

    Raises:
        BuildError: the interpreter is not the one of the target.
        CalledProcessError: pip or dpkg-deb failed.
    """
    if sys.version_info[:2] != (3, 11):
        raise BuildError("pydantic-core is for one Python: build with Debian 12's, 3.11")
    out.mkdir(parents=True, exist_ok=True)
    target = out / f"datapath_{version}_amd64.deb"
    with tempfile.TemporaryDirectory(prefix="datapath-deb-") as folder:
        root = Path(folder) / "root"
        root.mkdir()
        _environment(root)
        _programs(root)
        _copies(root)
        _changelog(root, version)
        for name in ("etc/datapath", "etc/datapath/policy.d"):
            (root / name).mkdir(parents=True, exist_ok=True)
        _normalise(root)
        _control_files(root, version)
        # xz, because Debian 12's own packages use it; root owns all, whoever builds.
        _run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(root), str(target))
    return target


def _environment(root: Path) -> None:
    """The private virtual environment, written by hand: `python3 -m venv` would put in links to itself."""
    site = root / _SITE
    site.mkdir(parents=True)
    (root / _HOME / "bin").mkdir()
    (root / _HOME / "bin/python").symlink_to("/usr/bin/python3")
    (root / _HOME / "pyvenv.cfg").write_text(
        "home = /usr/bin\ninclude-system-site-packages = true\n", encoding="utf-8"
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    _run(*pip, "--only-binary", ":all:", "--require-hashes", "--target", str(site), "-r", str(_REQUIREMENTS))
    shutil.rmtree(site / "bin", ignore_errors=True)
    for name in _NOT_SHIPPED:
        for path in site.glob(f"*.dist-info/{name}"):
            path.unlink()
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "datapath", site / "datapath", ignore=without_caches)
    shutil.copytree(REPOSITORY / "bpf", site / "datapath/_bpf", ignore=without_caches)
    # Compiled here, by hash, so that no time stamp matters, and root never writes files that dpkg does not know.
    _run(
        *(sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"),
        *("-s", str(root), "-p", "/", str(site)),
    )


def _programs(root: Path) -> None:
    folder = root / "usr/bin"
    folder.mkdir(parents=True)
    for name, function in _PROGRAMS.items():
        # -I: neither the caller's folder nor PYTHONPATH may put modules before ours.
        text = f"#!/{_HOME}/bin/python -I\nimport sys\n\nfrom datapath.cli import {function}\n"
        text += f"\nsys.exit({function}())\n"
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)


def _copies(root: Path) -> None:
    for source, destination in _FILES.items():
        path = root / destination
        path.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / source).is_dir():
            shutil.copytree(REPOSITORY / source, path, dirs_exist_ok=True)
        else:
            shutil.copyfile(REPOSITORY / source, path)


def _changelog(root: Path, version: str) -> None:
    """Debian's own changelog is only a frame: what changed is in the project's."""
    doc = root / _DOC
    frame = (
        f"datapath ({version}) bookworm; urgency=medium\n\n  * See changelog.gz.\n\n"
        " -- datapath <root@localhost>  Thu, 01 Jan 1970 00:00:00 +0000\n"
    )
    for name, data in (
        ("changelog.Debian.gz", frame.encode()),
        ("changelog.gz", (REPOSITORY / "CHANGELOG.md").read_bytes()),
    ):
        (doc / name).write_bytes(gzip.compress(data, mtime=0))


def _normalise(root: Path) -> None:
    """Modes that do not depend on the umask of whoever builds."""
    for path in _walk(root):
        if path.is_symlink():
            continue
        executable = path.is_dir() or path.parent.name == "bin"
        path.chmod(0o755 if executable else 0o644)


def _walk(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):
        yield Path(folder)
        yield from (Path(folder, name) for name in sorted(names))


def _control_files(root: Path, version: str) -> None:
    files = sorted(path for path in _walk(root) if path.is_file() and not path.is_symlink())
    folder = root / "DEBIAN"
    folder.mkdir(mode=0o755)
    size = sum(path.stat().st_size for path in files)
    (folder / "control").write_text(control(version, size // 1024), encoding="utf-8")
    (folder / "conffiles").write_text("".join(f"{name}\n" for name in CONFFILES), encoding="utf-8")
    (folder / "md5sums").write_text(checksums(root, files), encoding="utf-8")
    for name in _MAINTAINER_SCRIPTS:
        shutil.copyfile(REPOSITORY / "packaging/debian" / name, folder / name)
        (folder / name).chmod(0o755)


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True)
