# SPDX-License-Identifier: Apache-2.0
"""`steering: direct` asks nothing but the source of an answer: what else a network wants must not need more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.errors import Problem
from datapath.policy.model import Backend, Network, ReturnPath, Steering, Track

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.readable import Readable


def is_direct(readable: Readable, network: Network) -> bool:
    """Whether its answers are steered directly."""
    wish = network.steering or readable.top.get("steering", Steering.RULES)
    return (
        wish == Steering.DIRECT
        and bool(network.gateway_addresses)
        and network.return_path is not ReturnPath.NONE
    )


def direct(readable: Readable) -> Iterator[Problem]:
    """What `steering: direct` cannot do."""
    if readable.top.get("backend") == Backend.NFT and any(
        is_direct(readable, n) for _, n in readable.networks
    ):
        yield Problem(
            ("backend",),
            "`steering: direct` is done by an eBPF program, and `backend: nft` wants none",
            "leave `backend` out, or use `steering: rules`",
        )
    for index, network in readable.networks:
        path = ("networks", index)
        if network.steering is Steering.DIRECT and network.return_path is ReturnPath.NONE:
            yield Problem(
                (*path, "return_path"),
                "`return_path: none` leaves answers alone, and `steering: direct` sends them somewhere",
                "remove one of them",
            )
        if is_direct(readable, network):
            yield from _needs_rules(network, index)


def _needs_rules(network: Network, index: int) -> Iterator[Problem]:
    path = ("networks", index)
    if network.track is Track.LAST:
        yield Problem(
            (*path, "track"),
            "`steering: direct` does not track connections: an answer goes to the network of its VIP",
            "remove `track`, or use `steering: rules`",
        )
    if network.isolate_clients:
        yield Problem(
            (*path, "isolate_clients"),
            "`steering: direct` tells networks by the VIP alone, so it cannot keep equal clients apart",
            "remove `isolate_clients`, or use `steering: rules`",
        )
    if network.vrf is not None:
        yield Problem(
            (*path, "vrf"),
            "`steering: direct` keeps no routes, and what is in a VRF is routed by the VRF's table",
            "remove `vrf`, or use `steering: rules`",
        )
    for key in ("mark", "table"):
        if getattr(network, key) is not None:
            yield Problem((*path, key), f"`steering: direct` has no use for a {key}", f"remove `{key}`")
