# SPDX-License-Identifier: Apache-2.0
"""VIPs, gateways and prefixes make sense together."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from ipaddress import ip_network
from typing import TYPE_CHECKING

from datapath.errors import PolicyPath, Problem
from datapath.policy.addresses import IpAddress, VipRange, prefix_range, shown, united

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from datapath.plan.ingress import IpNetwork
    from datapath.policy.model import Network
    from datapath.policy.readable import Readable

#: Addresses that no host may have (RFC 6890), with what they are.
_NOT_SERVABLE: tuple[tuple[VipRange, str], ...] = tuple(
    (prefix_range(ip_network(prefix)), what)
    for prefix, what in (
        ("0.0.0.0/8", "unspecified"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved"),
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::ffff:0:0/96", "IPv4-mapped"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
    )
)


class RangeIndex:
    """Which of many ranges meets a given one, by bisection; those that overlap each other count as one."""

    def __init__(self, ranges: Iterable[VipRange]) -> None:
        self._ranges = united(ranges)
        self._lasts = [(r.version, int(r.last)) for r in self._ranges]

    def overlapping(self, vip: VipRange) -> VipRange | None:
        """The first range that shares an address with ``vip``."""
        position = bisect.bisect_left(self._lasts, (vip.version, int(vip.first)))
        if position == len(self._ranges):
            return None
        candidate = self._ranges[position]
        meets = candidate.version == vip.version and int(candidate.first) <= int(vip.last)
        return candidate if meets else None


NOT_SERVABLE_INDEX = RangeIndex(r for r, _ in _NOT_SERVABLE)
NOT_SERVABLE_NAME = dict(_NOT_SERVABLE)


def internal_index(readable: Readable) -> RangeIndex:
    """What is inside of the node, as far as it could be read."""
    return RangeIndex(map(prefix_range, readable.node.internal if readable.node else ()))


def vips_usable(readable: Readable) -> Iterator[Problem]:
    """A VIP is a unicast address that is not of the node's inside."""
    internal = internal_index(readable)
    for index, network in readable.networks:
        for position, vip in enumerate(network.vips):
            path = ("networks", index, "vips", position)
            refused = NOT_SERVABLE_INDEX.overlapping(vip)
            if refused:
                yield Problem(
                    path,
                    f"{vip} cannot be served: {'it is' if _within(vip, refused) else 'it holds'} "
                    f"{NOT_SERVABLE_NAME[refused]} ({refused})",
                    "list the addresses that clients connect to",
                )
                continue
            inside = internal.overlapping(vip)
            if inside:
                yield Problem(
                    path,
                    f"{vip} lies in node.internal ({inside})"
                    if _within(vip, inside)
                    else f"{vip} overlaps node.internal ({inside})",
                    "VIPs are outside of the pod and service prefixes: correct one of the two",
                )


def _within(inner: VipRange, outer: VipRange) -> bool:
    return int(outer.first) <= int(inner.first) and int(inner.last) <= int(outer.last)


@dataclass(frozen=True, slots=True)
class _Claim:
    """One VIP entry of one network."""

    vip: VipRange
    index: int
    position: int
    network: Network
    first: int
    last: int

    @property
    def path(self) -> PolicyPath:
        return ("networks", self.index, "vips", self.position)


class _Reach:
    """Of the claims seen so far, those that reach furthest: the best one, and the best of another network."""

    def __init__(self) -> None:
        self._best: _Claim | None = None
        self._other: _Claim | None = None

    def add(self, claim: _Claim) -> None:
        best = self._best
        if best is None or claim.last > best.last:
            if best is not None and best.index != claim.index:
                self._other = best
            self._best = claim
        elif claim.index != best.index and (self._other is None or claim.last > self._other.last):
            self._other = claim

    def meeting(self, claim: _Claim) -> _Claim | None:
        """A claim of another network that reaches into this one."""
        for candidate in (self._best, self._other):
            if candidate is not None and candidate.index != claim.index and candidate.last >= claim.first:
                return candidate
        return None


def vips_apart(readable: Readable) -> Iterator[Problem]:
    """No address twice in a network, nor in two networks unless both isolate their clients.

    A sweep over the sorted ranges. One problem for each entry, however many others it overlaps.
    """
    found: dict[PolicyPath, Problem] = {}
    for problem in _overlaps(readable):
        found.setdefault(problem.path, problem)
    yield from found.values()


def _overlaps(readable: Readable) -> Iterator[Problem]:
    claims = [
        _Claim(vip, index, position, network, int(vip.first), int(vip.last))
        for index, network in readable.networks
        for position, vip in enumerate(network.vips)
    ]
    for version in (4, 6):
        ordered = sorted((c for c in claims if c.vip.version == version), key=lambda c: c.vip.sort_key())
        own: dict[int, _Claim] = {}
        everyone, not_isolated = _Reach(), _Reach()
        for claim in ordered:
            same = own.get(claim.index)
            if same is not None and same.last >= claim.first:
                yield _twice(same, claim)
            if same is None or claim.last > same.last:
                own[claim.index] = claim
            isolated = claim.network.isolate_clients
            other = (not_isolated if isolated else everyone).meeting(claim)
            if other is not None:
                yield _shared(other, claim)
            everyone.add(claim)
            if not isolated:
                not_isolated.add(claim)


def _twice(one: _Claim, two: _Claim) -> Problem:
    first, second = sorted((one, two), key=lambda c: c.position)
    if first.vip == second.vip:
        return Problem(second.path, f"{second.vip} is listed twice", "remove one of them")
    return Problem(
        second.path, f"{second.vip} overlaps {first.vip} of the same network", "list each address once"
    )


def _shared(one: _Claim, two: _Claim) -> Problem:
    first, second = sorted((one, two), key=lambda c: c.index)
    what = "is already a VIP" if first.vip == second.vip else f"overlaps the VIP {first.vip}"
    return Problem(
        second.path,
        f"{second.vip} {what} of network {shown(first.network.name)}",
        "serve each address by one network, or set `isolate_clients: true` on both",
    )


def gateways(readable: Readable) -> Iterator[Problem]:
    """A gateway is a usable neighbour, one per family, for a family that has VIPs."""
    for index, network in readable.networks:
        families: set[int] = set()
        for position, gateway in enumerate(network.gateway):
            path = ("networks", index, "gateway", position)
            if gateway.version in families:
                yield Problem(
                    path, f"a second IPv{gateway.version} gateway", "name all of them in `gateways`"
                )
                continue
            families.add(gateway.version)
            problem = gateway_problem(path, network, gateway)
            if problem:
                yield problem


def gateway_problem(path: PolicyPath, network: Network, gateway: IpAddress) -> Problem | None:
    """Why this cannot be a gateway of that network."""
    if _is_nobodys(gateway):
        return Problem(
            path, f"{gateway} cannot be a gateway", "give the address of the router on this network"
        )
    if gateway.version not in network.vip_families:
        return Problem(
            path,
            f"an IPv{gateway.version} gateway, but network {shown(network.name)} has no VIPs of that family",
            f"add IPv{gateway.version} VIPs or remove this gateway",
        )
    served = next((v for v in network.vips if gateway in v and (v.is_single or not v.is_prefix)), None)
    if served:
        return Problem(
            path,
            f"the gateway {gateway} is one of the VIPs ({served})",
            "the router's address cannot be served here: take it out of `vips`",
        )
    if gateway.version == 6 and gateway.is_link_local:
        return None
    holding = [p for p in network.effective_on_link if p.version == gateway.version and gateway in p]
    if not holding:
        return _not_on_link(path, network, gateway)
    return _network_or_broadcast(path, gateway, holding[0])


def _is_nobodys(address: IpAddress) -> bool:
    # IPv6's global unicast addresses are none of these; `is_reserved` walks a list of fifteen prefixes to say so.
    if address.version == 6 and int(address) >> 125 == 1:
        return False
    return address.is_unspecified or address.is_loopback or address.is_multicast or address.is_reserved


def _not_on_link(path: PolicyPath, network: Network, gateway: IpAddress) -> Problem:
    if network.on_link:
        return Problem(
            path,
            f"the gateway {gateway} is not inside `on_link`",
            "add the prefix of the router's subnet to `on_link`",
        )
    return Problem(
        path,
        f"the gateway {gateway} is not inside any VIP prefix, so it is not known to be on this network",
        f"add `on_link` with the router's subnet, for example on_link: [{gateway}/{gateway.max_prefixlen}]",
    )


def _network_or_broadcast(path: PolicyPath, gateway: IpAddress, prefix: IpNetwork) -> Problem | None:
    # IPv6 has neither (all zeros is the subnet's router, RFC 4291), and a /31 has none (RFC 3021).
    if gateway.version == 6 or prefix.prefixlen >= 31:
        return None
    for address, what in ((prefix.network_address, "network"), (prefix.broadcast_address, "broadcast")):
        if gateway == address:
            return Problem(
                path, f"{gateway} is the {what} address of {prefix}", "give the router's own address"
            )
    return None


def prefix_lists(readable: Readable) -> Iterator[Problem]:
    """No prefix twice in a list, none both allowed and denied, none that is every address."""
    if readable.node is not None:
        yield from duplicates(("node", "internal"), readable.node.internal)
        yield from _everything(("node", "internal"), readable.node.internal)
    for index, network in readable.networks:
        base: PolicyPath = ("networks", index)
        yield from duplicates((*base, "on_link"), network.on_link)
        yield from _everything((*base, "on_link"), network.on_link)
        if network.vrf is not None:
            # Every address would be the whole main table, and there would be no VRF any more.
            yield from duplicates((*base, "vrf", "leak"), network.vrf.leak)
            yield from _everything((*base, "vrf", "leak"), network.vrf.leak)
        check = network.reverse_path
        yield from duplicates((*base, "reverse_path", "allow"), check.allow)
        yield from duplicates((*base, "reverse_path", "deny"), check.deny)
        allowed = set(check.allow)
        for position, prefix in enumerate(check.deny):
            if prefix in allowed:
                path = (*base, "reverse_path", "deny", position)
                yield Problem(path, f"{prefix} is both allowed and denied", "keep it in one of the lists")


def duplicates(path: PolicyPath, prefixes: Sequence[IpNetwork]) -> Iterator[Problem]:
    """A prefix that a list has twice."""
    seen: set[IpNetwork] = set()
    for position, prefix in enumerate(prefixes):
        if prefix in seen:
            yield Problem((*path, position), f"{prefix} is listed twice", "remove one of them")
        seen.add(prefix)


def _everything(path: PolicyPath, prefixes: Sequence[IpNetwork]) -> Iterator[Problem]:
    for position, prefix in enumerate(prefixes):
        if prefix.prefixlen == 0:
            yield Problem((*path, position), f"{prefix} is every address", "list the prefixes that are meant")
