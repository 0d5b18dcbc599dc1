# SPDX-License-Identifier: Apache-2.0
"""Names, marks and routing tables do not clash inside the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.errors import Problem
from datapath.policy.addresses import shown
from datapath.policy.check_steering import is_direct
from datapath.policy.marks import capacity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.readable import Readable


def names(readable: Readable) -> Iterator[Problem]:
    """Network names are unique."""
    first: dict[str, int] = {}
    for index, network in readable.networks:
        other = first.setdefault(network.name, index)
        if other != index:
            yield Problem(
                ("networks", index, "name"),
                f"the name {shown(network.name)} is already that of networks[{other}]",
                "give each network a name of its own",
            )


def marks(readable: Readable) -> Iterator[Problem]:
    """Pinned marks are inside the mask and differ; the mask has room for all networks."""
    first: dict[int, tuple[int, str]] = {}
    for index, network in readable.networks:
        if network.mark is None:
            continue
        path = ("networks", index, "mark")
        if readable.marks is not None:
            mask = readable.marks.effective_mask
            outside = network.mark & ~mask
            if outside:
                hint = "use bits of the mask only, or leave `mark` out: one is chosen"
                yield Problem(path, f"mark {network.mark:#x} has bits outside the mask {mask:#010x}", hint)
        other = first.setdefault(network.mark, (index, network.name))
        if other[0] != index:
            yield Problem(
                path,
                f"mark {network.mark:#x} is already that of network {shown(other[1])}",
                "leave `mark` out: one is chosen",
            )
    if readable.marks is not None:
        yield from _mask_has_room(readable, readable.marks.effective_mask)


def _mask_has_room(readable: Readable, mask: int) -> Iterator[Problem]:
    needed = sum(n.needs_mark and not is_direct(readable, n) for _, n in readable.networks)
    if needed > capacity(mask):
        yield Problem(
            ("marks",),
            f"the mask {mask:#010x} has room for {capacity(mask)} networks, but {needed} need a mark",
            f"{needed.bit_length()} bits are needed: use a wider `mask`",
        )


def tables(readable: Readable) -> Iterator[Problem]:
    """Each network has a table of its own, and each VRF."""
    owners: dict[int, str] = {}
    vrf_tables: dict[str, int] = {}
    for index, network in readable.networks:
        if network.vrf is None:
            continue
        path = ("networks", index, "vrf", "table")
        known = vrf_tables.setdefault(network.vrf.name, network.vrf.table)
        if known != network.vrf.table:
            yield Problem(
                path,
                f"VRF {shown(network.vrf.name)} has table {known} in another network",
                "a VRF has one table: write the same one",
            )
            continue
        owner = f"VRF {shown(network.vrf.name)}"
        other = owners.setdefault(network.vrf.table, owner)
        if other != owner:
            yield Problem(
                path, f"table {network.vrf.table} is already that of {other}", "give each VRF its own table"
            )
    for index, network in readable.networks:
        if network.table is None:
            continue
        path_of_table = ("networks", index, "table")
        if network.vrf is not None:
            yield Problem(path_of_table, "a network in a VRF uses the VRF's table", "remove `table`")
            continue
        owner = f"networks[{index}] ({shown(network.name)})"
        other = owners.setdefault(network.table, owner)
        if other != owner:
            yield Problem(
                path_of_table,
                f"table {network.table} is already that of {other}",
                "leave `table` out: one is chosen",
            )
