# SPDX-License-Identifier: Apache-2.0
"""Flowtables: those of others, which carry established flows past everybody's chains, and whether there can be any."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from datapath.kernel.features import try_nft
from datapath.kernel.nft_listing import list_nft
from datapath.plan.nft import TABLE_FAMILY, TABLE_NAME

#: One of these is there as soon as any flowtable is: the module's folder, or its counters where it is built in.
_TRACES: Final = (Path("/sys/module/nf_flow_table"), Path("/proc/thread-self/net/stat/nf_flowtable"))
#: Both modules, and the device that every namespace has.
FLOWTABLE_USE: Final = (
    "add table inet t; add chain inet t c { type filter hook forward priority 300; };"
    " add flowtable inet t f { hook ingress priority 0; devices = { lo }; }; add rule inet t c flow add @f"
)


def why_no_flowtables() -> str:
    """Why this kernel takes no flowtable; empty where it does. Tried in a namespace that ends with the question."""
    return try_nft(FLOWTABLE_USE)


def foreign_flowtables() -> tuple[str, ...]:
    """Family, table and name of each, sorted. A kernel that never had one is asked nothing."""
    if not any(path.exists() for path in _TRACES):
        return ()
    found = [item["flowtable"] for item in list_nft("flowtables") if "flowtable" in item]
    return tuple(
        sorted(
            f"{table['family']} {table['table']} {table['name']}"
            for table in found
            if (table["family"], table["table"]) != (TABLE_FAMILY, TABLE_NAME)
        )
    )
