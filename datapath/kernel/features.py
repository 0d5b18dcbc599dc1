# SPDX-License-Identifier: Apache-2.0
"""What this kernel can do for us: each feature is used once, in a network namespace that ends with the question."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Final

import nftables

from datapath.errors import DatapathError
from datapath.kernel import bpf
from datapath.plan.egress import LOG_GROUP
from datapath.plan.ingress import IngressProgram

_CLONE_NEWNET: Final = 0x40000000
_MASK: Final = 0x0FFF0000
_libc = ctypes.CDLL(None, use_errno=True)
_TABLE = "add table inet t; add chain inet t c { type filter hook prerouting priority -140; }; "
_NFT: Final = {
    "nft": _TABLE,
    "nft ct": f"{_TABLE} add rule inet t c ct mark set ct mark and 0xff ct direction reply counter",
    "nft egress": (
        f"{_TABLE} add chain inet t n {{ type nat hook postrouting priority 90; }}; "
        "add rule inet t n ct original ip saddr 192.0.2.1 fib daddr type unicast "
        "snat ip to jhash ip saddr mod 2 seed 1 map { 0 : 192.0.2.2, 1 : 192.0.2.3 }; "
        f'add rule inet t c log prefix "t" group {LOG_GROUP} drop'
    ),
    "nft fib": f"{_TABLE} add rule inet t c fib saddr . iif oif missing drop",
    "nft route chain": "add table inet t; add chain inet t c { type route hook output priority -140; }",
    "nft vmap": f"{_TABLE} add chain inet t d; add rule inet t c ct mark and 0xff vmap {{ 1 : goto d }}",
}


def probe_features() -> dict[str, str]:
    """Why each feature cannot be used; empty text where it can. Those that could not be tried are missing."""
    return _probe_nft(_NFT) | {"ebpf": _probe_ebpf()}


def try_nft(text: str) -> str:
    """Why the kernel refuses these nft commands; empty where it takes them, or nothing could be tried."""
    return _probe_nft({"": text}).get("", "")


def _probe_nft(features: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    # A thread may have a network namespace of its own, which goes with it.
    thread = threading.Thread(target=lambda: found.update(_probe_inside(features)))
    thread.start()
    thread.join()
    return found


def _probe_inside(features: Mapping[str, str]) -> dict[str, str]:
    if _libc.unshare(_CLONE_NEWNET) != 0:
        return {}
    return {name: _try(functools.partial(_load, text)) for name, text in features.items()}


def _try(use: Callable[[], str]) -> str:
    try:
        return use()
    except (OSError, DatapathError) as error:
        return str(error)


def _load(text: str) -> str:
    nft = nftables.Nftables()
    status, _, errors = nft.cmd("flush ruleset; " + text)
    return "" if status == 0 else str(errors).strip().splitlines()[0]


def _probe_ebpf() -> str:
    """Compiled and verified as it would be used, and attached nowhere."""

    def load() -> str:
        bpf.verify_ingress(IngressProgram(_MASK)).close()
        return ""

    return _try(load)
