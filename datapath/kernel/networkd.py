# SPDX-License-Identifier: Apache-2.0
"""systemd-networkd on this node: whether it runs here, and what its merged configuration says.

By default it removes ip rules and routes that are not in its own files, each time it starts (networkd.conf(5)).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datapath.state import current_netns

#: systemd.conf.d precedence, highest first.
_FOLDERS = ("etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd")
_FILE = "networkd.conf"
#: The kernel cuts process names at 15 bytes.
_COMM = "systemd-networkd"[:15]
_TRUE = frozenset({"1", "yes", "y", "true", "t", "on"})
_FALSE = frozenset({"0", "no", "n", "false", "f", "off"})
#: What it does where no file says otherwise.
DEFAULTS = {"ManageForeignRoutingPolicyRules": True, "ManageForeignRoutes": True}


@dataclass(frozen=True, slots=True)
class Networkd:
    """A running systemd-networkd.

    Attributes:
        manages: what of others it removes, by the name of the setting, and the file that says so.
        changed_since: files that are newer than the process, which reads them at its start only.
    """

    pid: int
    manages: dict[str, tuple[bool, str]]
    changed_since: tuple[str, ...] = ()


def observe_networkd(root: Path = Path("/")) -> Networkd | None:
    """The one of our network namespace; None where none runs."""
    for pid in _pids():
        files = config_files(root)
        started_s = _started_s(pid)
        newer = tuple(str(path) for path in files if path.stat().st_mtime > started_s)
        return Networkd(pid, read_settings(root), newer)
    return None


def config_files(root: Path) -> list[Path]:
    """Files that make the configuration, in the order in which they are read; the last one wins."""
    main = [path for folder in _FOLDERS if (path := root / folder / _FILE).is_file()]
    drop_ins: dict[str, Path] = {}
    for folder in reversed(_FOLDERS):
        with contextlib.suppress(OSError):
            for path in (root / folder / f"{_FILE}.d").iterdir():
                if path.suffix == ".conf":
                    drop_ins[path.name] = path
    # A link to /dev/null is no regular file: that is how one is switched off.
    return main[:1] + [drop_ins[name] for name in sorted(drop_ins) if drop_ins[name].is_file()]


def read_settings(root: Path) -> dict[str, tuple[bool, str]]:
    """Value and origin of each setting of `DEFAULTS`."""
    found = {name: (value, "the default") for name, value in DEFAULTS.items()}
    for path in config_files(root):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for name, text in _assignments(path.read_text(encoding="utf-8")):
                if name in DEFAULTS and text.lower() in _TRUE | _FALSE:
                    found[name] = (text.lower() in _TRUE, str(path))
    return found


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    section = ""
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("["):
            section = stripped
        elif section == "[Network]" and "=" in stripped and stripped[0] not in "#;":
            name, _, value = stripped.partition("=")
            yield name.strip(), value.strip()


def _pids() -> Iterator[int]:
    here = current_netns()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            if (entry / "comm").read_text().strip() == _COMM and (entry / "ns/net").stat().st_ino == here:
                yield int(entry.name)


def _started_s(pid: int) -> float:
    """Seconds since the epoch at the latest; field 22 of /proc/PID/stat counts whole ticks since boot.

    Not from `btime` of /proc/stat, which is in whole seconds: a file saved just before a restart would be newer.
    """
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    booted = time.clock_gettime(time.CLOCK_REALTIME) - time.clock_gettime(time.CLOCK_BOOTTIME)
    return booted + (ticks + 1) / os.sysconf("SC_CLK_TCK")
