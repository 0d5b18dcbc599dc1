# SPDX-License-Identifier: Apache-2.0
"""The whole network state of a namespace as text, without what changes by itself: to compare before and after."""

from __future__ import annotations

import difflib
import json
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from datapath.kernel.bpf import libbpf, tcx
from datapath.plan.tc import Direction
from tools.lab.netns import Namespace

_COUNTERS = re.compile(r"\[\d+:\d+\]")
_COMMENT = re.compile(r"^#.*\n", re.MULTILINE)
# `-d` prints what a bridge or its ports will do next, and when.
_TIMERS = re.compile(r" (?:\w*timer|gc_timer|expires)\s+\S+")


def dump_namespace(namespace: Namespace | str) -> dict[str, str]:
    """Return the state of a namespace in sections, each as sorted or kernel-ordered text.

    Sections: rules and routes of all tables (both families), links with addresses, qdiscs, tc filters, tcx and all
    other attached eBPF programs, the nft ruleset and both legacy iptables without counters, and every readable sysctl
    under net/ipv4 and net/ipv6. Connection-tracking and neighbour entries are left out: they come and go with traffic.

    Args:
        namespace: the lab's, or the name of any under /var/run/netns.
    """
    ns = Namespace(namespace) if isinstance(namespace, str) else namespace
    devices = sorted(link["ifname"] for link in json.loads(ns.run("ip", "-j", "link")))
    sections = {
        "rules4": ns.run("ip", "-4", "-N", "-d", "rule"),
        "rules6": ns.run("ip", "-6", "-N", "-d", "rule"),
        "routes4": _sorted(ns.run("ip", "-4", "-N", "-d", "route", "show", "table", "all")),
        "routes6": _sorted(ns.run("ip", "-6", "-N", "-d", "route", "show", "table", "all")),
        "links": _TIMERS.sub("", ns.run("ip", "-d", "addr")),
        "qdiscs": _sorted(ns.run("tc", "qdisc", "show")),
        "filters": "".join(
            f"{device} {side}: {text}"
            for device in devices
            for side in ("ingress", "egress")
            if (text := ns.run("tc", "filter", "show", "dev", device, side))
        ),
        "programs": ns.run("bpftool", "net", "show"),
        "tcx": ns.call(tcx_programs),
        "nft": ns.run("nft", "-s", "list", "ruleset"),
        "sysctls": ns.call(_sysctls),
    }
    for program in ("iptables", "ip6tables"):
        sections[program] = _COMMENT.sub("", _COUNTERS.sub("[0:0]", ns.run(f"{program}-legacy-save")))
    return sections


def tcx_programs() -> str:
    """Names of the tcx programs of the current namespace, in their order: bpftool of Debian 12 shows none."""
    if not tcx.is_supported():
        return ""
    return "".join(
        f"{device} {direction}: {_program_name(program_id)}\n"
        for index, device in socket.if_nameindex()
        for direction in Direction
        for program_id in tcx.programs(index, direction)
    )


def _program_name(program_id: int) -> str:
    with libbpf.program_fd_by_id(program_id) as program:
        return libbpf.program_info(program).name


def difference(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Return a unified diff of two dumps, empty if they are equal."""
    parts: list[str] = []
    for name in sorted({*before, *after}):
        old, new = before.get(name, "").splitlines(), after.get(name, "").splitlines()
        parts += difflib.unified_diff(old, new, f"{name} before", f"{name} after", lineterm="", n=1)
    return "\n".join(parts)


def _sorted(text: str) -> str:
    return "".join(sorted(text.splitlines(keepends=True)))


def _sysctls() -> str:
    lines = []
    for top in ("/proc/sys/net/ipv4", "/proc/sys/net/ipv6"):
        for folder, _, files in os.walk(top):
            for name in files:
                path = Path(folder, name)
                try:
                    lines.append(f"{path.relative_to('/proc/sys/net')} = {path.read_text().strip()}")
                except OSError:  # write-only, or a secret that is not set
                    continue
    return "\n".join(sorted(lines)) + "\n"
