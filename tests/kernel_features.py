# SPDX-License-Identifier: Apache-2.0
"""Kernel features that a test may need and a kernel may lack, each with a probe that asks the kernel itself.

A test names its features with ``@pytest.mark.kernel_feature("vrf")``. It is skipped only where the
probe fails, and with ``DATAPATH_CI=1`` any other skip is a failure (see conftest.py).
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Final

#: A skipped test gives exactly this reason, so that conftest.py can ask the probe again.
SKIP_REASON_PREFIX: Final = "kernel lacks "


@dataclass(frozen=True, slots=True)
class _Probe:
    """Commands that all succeed, in one new network namespace, if and only if the kernel has the feature."""

    commands: tuple[tuple[str, ...], ...]


def _link(kind: str, *options: str) -> _Probe:
    return _Probe((("ip", "link", "add", "probe0", "type", kind, *options),))


def _nft(*statements: str) -> _Probe:
    table = "add table inet probe; add chain inet probe c { type filter hook forward priority 0; }; "
    return _Probe((("nft", table + "; ".join(statements)),))


# Every kernel that can run the tests at all has veth, so it carries the other kinds.
_PARENT: Final = ("ip", "link", "add", "parent0", "type", "veth", "peer", "name", "parent1")

# BPF_PROG_QUERY of BPF_TCX_INGRESS at loopback: bpftool of Debian 12 knows nothing of it.
_TCX: Final = """
import ctypes
count, flags = ctypes.c_uint32(0), ctypes.c_uint32(0)
query = ctypes.CDLL("libbpf.so.1").bpf_prog_query
raise SystemExit(query(1, 46, 0, ctypes.byref(flags), None, ctypes.byref(count)) != 0)
"""

PROBES: Final[dict[str, _Probe]] = {
    "8021q": _Probe(
        (_PARENT, ("ip", "link", "add", "link", "parent0", "name", "p.1", "type", "vlan", "id", "1"))
    ),
    "bonding": _link("bond"),
    "bridge": _link("bridge"),
    "cls_bpf": _Probe(
        (
            _PARENT,
            ("tc", "qdisc", "add", "dev", "parent0", "clsact"),
            # One instruction of classic BPF (return 0): the classifier exists, whatever eBPF may do.
            ("tc", "filter", "add", "dev", "parent0", "ingress", "bpf", "bytecode", "1,6 0 0 0,"),
        )
    ),
    "dummy": _link("dummy"),
    "macvlan": _Probe((_PARENT, ("ip", "link", "add", "link", "parent0", "name", "m0", "type", "macvlan"))),
    "nf_flow_table": _nft("add flowtable inet probe f { hook ingress priority 0; devices = { lo }; }"),
    "nf_tables": _nft(),
    "nft_fib": _nft("add rule inet probe c fib saddr . iif oif missing drop"),
    "tcx": _Probe(((sys.executable, "-c", _TCX),)),
    "veth": _link("veth", "peer", "name", "probe1"),
    "vrf": _link("vrf", "table", "4242"),
}


@functools.cache
def kernel_has(feature: str) -> bool:
    """Whether the running kernel has a feature, found by using it in a network namespace of its own.

    Loads the module if the kernel has it as one. Needs root.

    Raises:
        KeyError: nobody wrote a probe for this feature.
        subprocess.CalledProcessError: no network namespace can be made and used here.
    """
    probe = PROBES[feature]
    namespace = f"dp-probe-{os.getpid()}"
    inside = ["ip", "netns", "exec", namespace]
    subprocess.run(["ip", "netns", "add", namespace], check=True, capture_output=True, timeout=30)
    try:
        # Where nothing at all works in a namespace, a failed probe says nothing about the kernel.
        subprocess.run([*inside, "ip", "link", "show", "lo"], check=True, capture_output=True, timeout=30)
        return all(
            subprocess.run([*inside, *command], check=False, capture_output=True, timeout=30).returncode == 0
            for command in probe.commands
        )
    finally:
        subprocess.run(["ip", "netns", "delete", namespace], check=True, capture_output=True, timeout=30)
