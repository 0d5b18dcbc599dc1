# SPDX-License-Identifier: Apache-2.0
"""The package's description of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

#: What a node must have: lane `run` of tools/setup/packages.txt, without python3-venv, which only a
#: checkout needs.
DEPENDS: Final = (
    # pydantic-core is compiled for exactly this Python.
    "python3 (>= 3.11)",
    "python3 (<< 3.12)",
    "python3-nftables",
    "python3-bpfcc",
    "nftables",
    "linux-libc-dev",
    "libbpf1",
    "libc6 (>= 2.28)",
    "iproute2",
    "kmod",
    # ExecReload: /bin/kill
    "procps",
    "init-system-helpers (>= 1.54~)",
)
CONFFILES: Final = ("/etc/default/datapath", "/etc/sysctl.d/60-datapath.conf")

_DESCRIPTION: Final = """\
Description: Replies leave by the network their requests came in on
 Compiles a policy into one nftables table, a tc eBPF program, ip rules and
 routing tables, so that a node answers for virtual addresses by the VLAN that
 their clients came from, and drops what cannot have come from there.
 .
 The service is enabled, and does nothing until /etc/datapath/policy.yaml is
 there. Stopping it leaves the datapath in force; removing the package takes
 it down.
"""


def control(version: str, installed_kib: int) -> str:
    """The control file."""
    return (
        "Package: datapath\n"
        f"Version: {version}\n"
        "Architecture: amd64\n"
        "Maintainer: datapath <root@localhost>\n"
        f"Installed-Size: {installed_kib}\n"
        f"Depends: {', '.join(DEPENDS)}\n"
        "Recommends: systemd\n"
        "Suggests: iptables, conntrack\n"
        "Section: net\n"
        "Priority: optional\n"
        f"{_DESCRIPTION}"
    )


def checksums(root: Path, files: Iterable[Path]) -> str:
    """What `dpkg --verify` compares with."""
    return "".join(
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(root)}\n"
        for path in files
    )
