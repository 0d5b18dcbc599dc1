# SPDX-License-Identifier: Apache-2.0
"""Which connection-tracking zones other programs on this node use.

Rules say what will be used, entries what is: Open vSwitch (and so OVN) has no rules that could be read here, but its
connections are in the same table. Those have their zone in both directions, ours only in the original one.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from typing import Any, Final

from datapath.errors import KernelError
from datapath.kernel.ctnetlink import CTA_ZONE, dump_entries, entry_attributes, open_ctnetlink
from datapath.kernel.nft_listing import list_nft
from datapath.kernel.rules_of_others import iptables_rules, nft_rules
from datapath.log import get_logger

#: The attribute's header, in this machine's byte order: most entries have none, and need not be taken apart.
_ZONE_HEADER: Final = struct.pack("=HH", 6, CTA_ZONE)
_IPTABLES_ZONE: Final = re.compile(r"-j CT .*?--zone(?:-orig|-reply)? (?P<zone>\d+)")


def has_stale_early_demux(release: str) -> bool:
    """Whether a kernel is older than the repair of that (Linux 6.6; Debian's 6.1 has not got it)."""
    version = re.match(r"(\d+)\.(\d+)", release)
    return version is not None and (int(version[1]), int(version[2])) < (6, 6)


def observe_zones() -> dict[int, str]:
    """Zones of others, with one of those who use it."""
    owners: dict[int, str] = {}
    for found in (_nft_zones(), _iptables_zones(), _entries()):
        for zone, owner in found:
            if zone:
                owners.setdefault(zone, owner)
    return owners


def _nft_zones() -> Iterator[tuple[int, str]]:
    for rule in nft_rules():
        for expression in rule.expressions:
            mangle = expression.get("mangle", {})
            if (mangle.get("key", {}).get("ct") or {}).get("key") == "zone":
                for zone in _values(mangle["value"], rule.table):
                    yield zone, rule.where


def _values(value: Any, table: tuple[str, str]) -> Iterator[int]:
    """A number, or all that a map may answer."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict) and "map" in value:
        data = value["map"]["data"]
        if isinstance(data, str):
            for item in list_nft(f"map {' '.join(table)} {data.removeprefix('@')}"):
                yield from (answer for _, answer in item.get("map", {}).get("elem", []))
        else:
            yield from (answer for _, answer in data["set"])


def _iptables_zones() -> Iterator[tuple[int, str]]:
    for rule in iptables_rules():
        if match := _IPTABLES_ZONE.search(rule.text):
            yield int(match["zone"]), rule.where


def _entries() -> Iterator[tuple[int, str]]:
    try:
        with open_ctnetlink() as channel:
            bodies = dump_entries(channel, socket.AF_UNSPEC)
    except (KernelError, OSError) as error:
        get_logger().warning("zones_not_read", reason=str(error))
        return
    for body in bodies:
        if _ZONE_HEADER in body:
            zone = entry_attributes(body).get(CTA_ZONE, b"")
            yield (
                int.from_bytes(zone, "big"),
                "connections that are tracked there, as by Open vSwitch and OVN",
            )
