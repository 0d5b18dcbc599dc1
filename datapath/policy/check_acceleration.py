# SPDX-License-Identifier: Apache-2.0
"""`accelerate` takes connections over by the mark that they carry, and keeps the way that they had at that moment."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.errors import Problem
from datapath.policy.addresses import shown
from datapath.policy.check_steering import is_direct
from datapath.policy.model import Network, ReturnPath, Track

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.readable import Readable

_USUAL = "`accelerate: false` for this network"


def accelerated(readable: Readable) -> Iterator[Problem]:
    """What a flowtable cannot carry."""
    by_default = readable.top.get("accelerate") is True
    for index, network in readable.networks:
        if not (by_default if network.accelerate is None else network.accelerate):
            continue
        found = _contradiction(readable, network)
        if found is None and network.accelerate:
            # Where only the file asks for it, networks that need nothing get nothing.
            found = _nothing_to_do(network)
        if found is not None:
            key, message, remedy = found
            yield Problem(("networks", index, key), message, f"{remedy}, or {_USUAL}")


def _contradiction(readable: Readable, network: Network) -> tuple[str, str, str] | None:
    """The key that stands in the way, why, and what else to write there; None where nothing does."""
    if is_direct(readable, network):
        return (
            "steering",
            "`steering: direct` keeps no mark in connections: `accelerate` knows them by it",
            "use `steering: rules`",
        )
    if network.return_path is ReturnPath.SOURCE:
        return (
            "return_path",
            "`return_path: source` keeps no mark in connections: `accelerate` knows them by it",
            "use `return_path: conntrack`",
        )
    if network.track is Track.LAST:
        return (
            "track",
            "`track: last` looks at every packet, and `accelerate` keeps a connection on the way that it had",
            "use `track: first`",
        )
    return None


def _nothing_to_do(network: Network) -> tuple[str, str, str] | None:
    if network.needs_mark:
        return None
    return (
        "accelerate",
        f"nothing to accelerate: replies of {shown(network.name)} are not steered (no gateway, or `return_path: none`)",
        "remove it",
    )
