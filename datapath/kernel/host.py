# SPDX-License-Identifier: Apache-2.0
"""What `datapath doctor` asks a node: beside its network, who else works on it. Changes nothing."""

from __future__ import annotations

import configparser
import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datapath.errors import DatapathError
from datapath.kernel import sysctl
from datapath.kernel.features import probe_features
from datapath.kernel.marks_in_use import observe_marks
from datapath.kernel.networkd import Networkd, observe_networkd
from datapath.reconcile.actual import ForeignMark
from datapath.state import DAEMON_LOCK, StateDirectory

_CONF = ("rp_filter", "src_valid_mark", "arp_ignore", "arp_announce")
_NM_DEVICES = Path("/run/NetworkManager/devices")


@dataclass(frozen=True, slots=True)
class DirectoryView:
    """The state directory.

    Attributes:
        is_there: it exists; one that does not is made by the first apply.
        is_writable: files can be made in it, or in the nearest folder above that exists.
        free_bytes: of its file system, for root.
        damage: why the state cannot be read; empty where it can.
    """

    path: str
    is_there: bool = True
    is_writable: bool = True
    free_bytes: int = 1 << 40
    damage: str = ""
    damage_hint: str = ""


@dataclass(frozen=True, slots=True)
class HostView:
    """One node, as far as it is not in the plan's terms.

    Attributes:
        is_root: of this process; others see only a part.
        capabilities: effective, of this process (CAP_* as bits).
        managed_by_nm: devices that NetworkManager manages.
        sysctls: `rp_filter`, `src_valid_mark`, `arp_*` of every device, by key.
        forwarding: by IP version.
        features: why a kernel feature cannot be used, by its name; empty where it can.
        conntrack: entries now, and how many are possible; None without connection tracking.
        rp_filter_drops: packets that the kernel's reverse-path filter dropped since boot.
        marks: rules of others that write marks.
        daemon: pid of the daemon of this state directory; None where none runs.
        packet_sockets: that the daemon has open; None where that cannot be seen.
    """

    directory: DirectoryView
    is_root: bool = True
    capabilities: int = (1 << 41) - 1
    networkd: Networkd | None = None
    managed_by_nm: frozenset[str] = frozenset()
    sysctls: dict[str, str] = field(default_factory=dict)
    forwarding: dict[int, bool] = field(default_factory=lambda: {4: True, 6: True})
    features: dict[str, str] = field(default_factory=dict)
    conntrack: tuple[int, int] | None = None
    rp_filter_drops: int = 0
    marks: tuple[ForeignMark, ...] = ()
    daemon: int | None = None
    packet_sockets: int | None = None


def observe_host(directory: StateDirectory) -> HostView:
    """Everything at once; takes about a second, most of it for the eBPF compiler."""
    daemon = lock_holder(directory.path / DAEMON_LOCK)
    return HostView(
        directory=_directory(directory),
        is_root=os.geteuid() == 0,
        capabilities=_capabilities(),
        networkd=observe_networkd(),
        managed_by_nm=frozenset(_managed_by_nm()),
        sysctls=_sysctls(),
        forwarding=sysctl.forwarding(),
        features=probe_features(),
        conntrack=_conntrack(),
        rp_filter_drops=_rp_filter_drops(),
        marks=observe_marks(),
        daemon=daemon,
        packet_sockets=None if daemon is None else packet_sockets(daemon),
    )


def _directory(directory: StateDirectory) -> DirectoryView:
    path = directory.path
    nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free = os.statvfs(nearest)
    damage = hint = ""
    try:
        directory.load()
    except DatapathError as error:
        damage, hint = str(error), error.hint
    return DirectoryView(
        path=str(path),
        is_there=path.exists(),
        is_writable=os.access(nearest, os.W_OK | os.X_OK),
        free_bytes=free.f_bavail * free.f_frsize,
        damage=damage,
        damage_hint=hint,
    )


def _capabilities() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1], 16) for line in lines if line.startswith("CapEff:"))


def _managed_by_nm() -> Iterator[str]:
    """NetworkManager says so in a file for each device, by its index."""
    with contextlib.suppress(OSError):
        for path in _NM_DEVICES.iterdir():
            parser = configparser.ConfigParser(interpolation=None, strict=False)
            with contextlib.suppress(OSError, ValueError, configparser.Error):
                parser.read_string(path.read_text(encoding="utf-8"))
                if parser.getboolean("device", "managed", fallback=False):
                    yield socket.if_indextoname(int(path.name))


def _sysctls() -> dict[str, str]:
    folder = sysctl.ROOT / "net/ipv4/conf"
    try:
        devices = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return {}
    keys = [f"net/ipv4/conf/{device}/{name}" for device in devices for name in _CONF]
    values = {key: sysctl.read(key) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def _conntrack() -> tuple[int, int] | None:
    count, most = (sysctl.read(f"net/netfilter/nf_conntrack_{name}") for name in ("count", "max"))
    return (int(count), int(most)) if count and most else None


def _rp_filter_drops() -> int:
    """`IPReversePathFilter` of /proc/net/netstat: pairs of lines, names and values."""
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split() for line in Path("/proc/thread-self/net/netstat").read_text().splitlines()]
        for names, values in zip(lines[::2], lines[1::2], strict=False):
            if "IPReversePathFilter" in names:
                return int(values[names.index("IPReversePathFilter")])
    return 0


def lock_holder(path: Path) -> int | None:
    """Pid of the process that holds flock(2) on a file; asked without trying to get it ourselves."""
    try:
        status = path.stat()
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in locks:
        words = line.split()
        if len(words) == 8 and words[1] == "FLOCK" and words[5] == wanted:
            return int(words[4])
    return None


def packet_sockets(pid: int) -> int | None:
    """How many a process has open: one that may not have any cannot ask neighbours."""
    folder = Path("/proc", str(pid))
    try:
        lines = (folder / "net/packet").read_text(encoding="ascii").splitlines()[1:]
        links = {str(entry.readlink()) for entry in (folder / "fd").iterdir()}
    except OSError:
        return None
    return sum(f"socket:[{line.split()[-1]}]" in links for line in lines)
