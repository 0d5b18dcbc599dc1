# SPDX-License-Identifier: Apache-2.0
"""Parts of a policy that name one of its networks."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from datapath.errors import PolicyPath, Problem
from datapath.policy.addresses import shown
from datapath.policy.model import Network, ProbeProtocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.readable import Readable


def egress(readable: Readable) -> Iterator[Problem]:
    """`egress[].network` exists, and its addresses are one per family."""
    networks = {network.name: network for _, network in readable.networks}
    for index, entry in readable.egress:
        path: PolicyPath = ("egress", index)
        yield from _unknown_network((*path, "network"), entry.network, networks, readable)
        families = [address.version for address in entry.source_address]
        if len(families) != len(set(families)):
            yield Problem(
                (*path, "source_address"), "two addresses of one family", "give at most one per family"
            )


def probes(readable: Readable) -> Iterator[Problem]:
    """`probes[].network` exists and serves the address; ports go with protocols that have them."""
    networks = {network.name: network for _, network in readable.networks}
    for index, probe in readable.probes:
        path: PolicyPath = ("probes", index)
        yield from _unknown_network((*path, "network"), probe.network, networks, readable)
        network = networks.get(probe.network)
        if network and not any(probe.address in vip for vip in network.vips):
            yield Problem(
                (*path, "address"),
                f"{probe.address} is not a VIP of network {shown(network.name)}",
                "probe an address that the network serves",
            )
        if probe.protocol is ProbeProtocol.ICMP and probe.port is not None:
            yield Problem((*path, "port"), "ICMP has no ports", "remove `port`")
        if probe.protocol is not ProbeProtocol.ICMP and probe.port is None:
            yield Problem(path, f"a {probe.protocol} probe needs a port", "add `port`")


def _unknown_network(
    path: PolicyPath, name: str, networks: dict[str, Network], readable: Readable
) -> Iterator[Problem]:
    if name in networks or not readable.complete:
        return
    near = difflib.get_close_matches(name, networks, n=1)
    hint = f"did you mean {near[0]}?" if near else "name one of `networks`"
    yield Problem(path, f"there is no network {shown(name)}", hint)
