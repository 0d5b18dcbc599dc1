# SPDX-License-Identifier: Apache-2.0
"""`routes: external` leaves the next hops to a routing daemon: nothing else of a network may claim to know them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.errors import PolicyPath, Problem
from datapath.plan.ingress import VipCheck
from datapath.policy.model import Network, ReturnPath, Steering

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.readable import Readable


def external(readable: Readable) -> Iterator[Problem]:
    """What `routes: external` needs, and what it leaves no sense to."""
    for index, network in readable.networks:
        if not network.has_external_routes:
            continue
        path: PolicyPath = ("networks", index)
        yield from _table(path, network)
        yield from _contradictions(path, network)
        wish = network.steering or readable.top.get("steering", Steering.RULES)
        if wish == Steering.DIRECT:
            yield Problem(
                (*path, "routes"),
                "`steering: direct` sends answers to `gateway`, and with `routes: external` there is none",
                "add `steering: rules` to this network",
            )


def _table(path: PolicyPath, network: Network) -> Iterator[Problem]:
    if network.table is None and network.vrf is None:
        yield Problem(
            (*path, "routes"),
            "`routes: external` needs `table`: the routing daemon must be told the number",
            "add for example `table: 1000`, and let the daemon install its routes there",
        )


def _contradictions(path: PolicyPath, network: Network) -> Iterator[Problem]:
    if network.gateway_addresses:
        key = "gateways" if network.gateways else "gateway"
        yield Problem(
            (*path, key),
            "`routes: external` takes the next hops from the table, so there is no use for a gateway",
            f"remove `{key}`; where neighbours are to be reached directly, name their subnet in `on_link`",
        )
    if network.return_path is ReturnPath.NONE:
        yield Problem(
            (*path, "return_path"),
            "with `return_path: none` nobody looks the table of `routes: external` up",
            "remove one of them",
        )
    reverse_path = network.reverse_path
    if "vips" in reverse_path.model_fields_set and reverse_path.vips is VipCheck.FEASIBLE:
        yield Problem(
            (*path, "reverse_path", "vips"),
            "`feasible` asks what the network's table can reach, and with `routes: external` that changes by itself",
            "leave `vips` out: all sources pass that are neither spoofed nor martian",
        )
