# SPDX-License-Identifier: Apache-2.0
"""Parts of a policy that name one of its networks."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from datapath.errors import PolicyPath, Problem
from datapath.policy.addresses import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.model import Network
    from datapath.policy.readable import Readable


def probes(readable: Readable) -> Iterator[Problem]:
    """The networks that probes name exist and have what is probed; each probe is there once."""
    networks = {network.name: network for _, network in readable.networks}
    seen: dict[object, int] = {}
    for index, probe in readable.probes:
        path: PolicyPath = ("probes", index)
        name = probe.network_name
        if name is not None:
            key = "network" if probe.gateway is None else "gateway"
            yield from unknown_network((*path, key), name, networks, readable)
        network = networks.get(probe.gateway or "")
        if network and not network.gateway_addresses:
            yield Problem(
                (*path, "gateway"),
                f"network {shown(network.name)} has no gateway",
                "give it one, or probe a host on it with `tcp`",
            )
        endpoint = probe.endpoint
        if endpoint and endpoint.address.is_link_local and probe.network is None:
            yield Problem(
                path, f"{endpoint.address} is on many links", "add `network`: which of them is meant?"
            )
        first = seen.setdefault((probe.gateway, probe.tcp, probe.http, probe.network), index)
        if first != index:
            yield Problem(path, f"the same as probes[{first}]", "remove one of them")


def unknown_network(
    path: PolicyPath, name: str, networks: dict[str, Network], readable: Readable
) -> Iterator[Problem]:
    """A network of that name is in the file."""
    if name in networks or not readable.complete:
        return
    near = difflib.get_close_matches(name, networks, n=1)
    hint = f"did you mean {near[0]}?" if near else "name one of `networks`"
    yield Problem(path, f"there is no network {shown(name)}", hint)
