# SPDX-License-Identifier: Apache-2.0
"""`isolate_clients`: connections of a network are told apart by their zone, so its answers must follow connections."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.errors import Problem
from datapath.policy.addresses import shown
from datapath.policy.check_steering import is_direct
from datapath.policy.model import ReturnPath, Track

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.errors import PolicyPath
    from datapath.policy.model import Network
    from datapath.policy.readable import Readable


def isolation(readable: Readable) -> Iterator[Problem]:
    """What an isolated network needs, and which zones are pinned."""
    first: dict[int, tuple[int, str]] = {}
    for index, network in readable.networks:
        path: PolicyPath = ("networks", index)
        if network.isolate_clients and not is_direct(readable, network):
            yield from _follows_connections(network, path)
        if network.zone is None:
            continue
        if not network.isolate_clients:
            yield Problem(
                (*path, "zone"),
                "a zone is for networks whose clients are isolated",
                "set `isolate_clients: true`, or remove `zone`",
            )
        other = first.setdefault(network.zone, (index, network.name))
        if other[0] != index:
            yield Problem(
                (*path, "zone"),
                f"zone {network.zone} is already that of network {shown(other[1])}",
                "leave `zone` out: one is chosen",
            )


def _follows_connections(network: Network, path: PolicyPath) -> Iterator[Problem]:
    if network.return_path is not ReturnPath.CONNTRACK:
        yield Problem(
            (*path, "return_path"),
            f"`return_path: {network.return_path}` does not look at connections, and nothing else tells equal clients"
            " of two networks apart",
            "remove `return_path`, or `isolate_clients`",
        )
    elif not network.needs_mark:
        yield Problem(
            (*path, "isolate_clients"),
            "without a gateway, answers follow the main table, which cannot tell equal clients of two networks apart",
            "add `gateway`, or remove `isolate_clients`",
        )
    if network.track is Track.LAST:
        yield Problem(
            (*path, "track"),
            "connections of an isolated network are its own, and `track: last` lets them move to another",
            "remove `track`, or `isolate_clients`",
        )


def shared_vips(readable: Readable) -> Iterator[Problem]:
    """A VIP on several isolated networks is unambiguous where each has a gateway of that family."""
    sharing = _sharing(readable)
    for index, network in readable.networks:
        if not network.needs_mark or is_direct(readable, network):
            # Refused already, with a better reason.
            continue
        for position, vip in enumerate(network.vips):
            if (index, position) in sharing and not network.is_routed(vip.version):
                yield Problem(
                    ("networks", index, "vips", position),
                    f"{vip} is served on another network, too, and this one has no IPv{vip.version} gateway: its"
                    " answers would follow the main table",
                    f"add an IPv{vip.version} gateway, or serve the address by one network",
                )


def _sharing(readable: Readable) -> frozenset[tuple[int, int]]:
    """Index of network and VIP of what lies in VIPs of two isolated networks; a sweep over the sorted ranges."""
    found: set[tuple[int, int]] = set()
    for version in (4, 6):
        entries = sorted(
            (vip, index, position)
            for index, network in readable.networks
            if network.isolate_clients
            for position, vip in enumerate(network.vips)
            if vip.version == version
        )
        group: list[tuple[int, int]] = []
        end = -1
        for vip, index, position in entries:
            if int(vip.first) > end:
                found |= _of_several(group)
                group = []
            group.append((index, position))
            end = max(end, int(vip.last))
        found |= _of_several(group)
    return frozenset(found)


def _of_several(group: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """The group, if it is of more than one network."""
    return set(group) if len({index for index, _ in group}) > 1 else set()
