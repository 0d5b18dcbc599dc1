# SPDX-License-Identifier: Apache-2.0
"""Facts of the machine that figures were taken on; without them they are only numbers."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

_MITIGATIONS: Final = Path("/sys/devices/system/cpu/vulnerabilities")
_PROGRAMS: Final = {
    "nft": ("nft", "--version"),
    "iptables": ("iptables-nft", "--version"),
    "clang": ("clang-14", "--version"),
    "revision": ("git", "describe", "--always", "--dirty"),
}
#: Debian's; the version of a Python module of the system is that of its package.
_PACKAGES: Final = ("python3-bpfcc", "python3-nftables", "libbpf1")


def _first_line(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=10)
    except OSError:
        return "absent"
    return (done.stdout.splitlines() or [""])[0].strip()


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_mb() -> int:
    first = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()[0]
    return int(first.split()[1]) // 1024


def _mitigations() -> dict[str, str]:
    """What makes indirect calls and system calls dear; only what is not simply absent."""
    if not _MITIGATIONS.is_dir():
        return {}
    found = {path.name: path.read_text(encoding="utf-8").strip() for path in sorted(_MITIGATIONS.iterdir())}
    return {name: text for name, text in found.items() if text != "Not affected"}


def steal_s() -> float:
    """CPU time that a hypervisor gave to others since boot, all CPUs."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


def facts() -> dict[str, Any]:
    """Everything that a figure may depend on and that can be asked for."""
    virtualised = _first_line("systemd-detect-virt") or "unknown"
    return {
        "kernel": platform.release(),
        "cpu": _cpu(),
        "cpus": os.cpu_count(),
        "memory_mb": _memory_mb(),
        "virtualisation": virtualised,
        "mitigations": _mitigations(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "taken_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        **{name: _first_line(*argv) for name, argv in _PROGRAMS.items()},
        **{name: _first_line("dpkg-query", "-W", "-f", "${Version}", name) for name in _PACKAGES},
    }
