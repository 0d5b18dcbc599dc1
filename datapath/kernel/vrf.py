# SPDX-License-Identifier: Apache-2.0
"""What of others would be lost when a device is put into a VRF: the kernel sets it down and up for that."""

from __future__ import annotations

from collections.abc import Mapping

from datapath.kernel.fib_codec import AF, RouteDecoder
from datapath.kernel.netlink import Netlink
from datapath.kernel.rtnl import ifindex
from datapath.kernel.rtnl_dump import dump_routes
from datapath.plan.model import Plan
from datapath.plan.rtnl import ROUTE_PROTOCOL, TABLE_MAIN
from datapath.reconcile.actual import ActualLink

#: RTPROT_KERNEL: routes of the device's own addresses, which the kernel makes again.
_BY_ITSELF = 2


def stranded(plan: Plan, links: Mapping[str, ActualLink]) -> dict[str, str]:
    """In words, by device; only of devices that are in no VRF yet."""
    found: dict[str, str] = {}
    ours = {link.name for link in plan.links}
    for slave in plan.slaves:
        present = links.get(slave.device)
        if present is None or present.vrf or not present.up:
            continue
        uppers = sorted(
            link.name
            for link in links.values()
            if link.parent == slave.device and link.up and link.name not in ours
        )
        what = (
            f"the addresses and routes of {uppers[0]}, which lies on it" if uppers else _route(slave.device)
        )
        if what:
            found[slave.device] = what
    return found


def _route(device: str) -> str:
    """One that somebody has in the main table, if any."""
    with Netlink() as netlink:
        for family, number in AF.items():
            bodies = dump_routes(netlink, number, table=TABLE_MAIN, device=ifindex(device))
            for protocol, route in RouteDecoder(family, lambda _: device).decode(bodies):
                if protocol not in (_BY_ITSELF, ROUTE_PROTOCOL):
                    via = f" via {route.gateway}" if route.gateway else ""
                    return f"the main table's route to {route.destination}{via}"
    return ""
