# SPDX-License-Identifier: Apache-2.0
"""`steering: direct`: answers are sent to their network as they leave, by the VIP that is their source.

It serves what reaches the egress of a device that main's default routes leave by. What cannot be served is said
here, with its place in the policy, rather than left to be found by packets.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

from datapath.compiler.context import Context, NetworkContext, Treatment
from datapath.compiler.gateways import gateways_in_use
from datapath.errors import PolicyPath, Problem
from datapath.facts import STACKED_KINDS, LinkFacts
from datapath.plan.ingress import IpNetwork, prefix_order
from datapath.plan.model import Note, NoteLevel
from datapath.plan.steering import SteeredNetwork, SteeringProgram

#: No router takes these: they are meant for the link that they leave by.
_LINK_ONLY: tuple[IpNetwork, ...] = (
    IPv4Network("169.254.0.0/16"),
    IPv4Network("224.0.0.0/4"),
    IPv4Network("255.255.255.255/32"),
    IPv6Network("fe80::/10"),
    IPv6Network("ff00::/8"),
)
_USE_RULES = "use `steering: rules` for this network"


@dataclass(frozen=True, slots=True)
class _DefaultWay:
    """How answers leave if nobody steers them; the same for all networks.

    Attributes:
        devices: of every default route, whatever its metric: when one goes, the next takes over and has the program
            already.
        subnets: on their links, with the device.
        mtus: of all devices of the host, by name.
    """

    devices: tuple[str, ...]
    links: tuple[LinkFacts, ...]
    subnets: tuple[tuple[str, IpNetwork], ...]
    mtus: Mapping[str, int]

    @classmethod
    def of(cls, context: Context) -> _DefaultWay:
        facts = context.facts
        families = {family for network in context.networks for family in network.families(Treatment.DIRECT)}
        devices = {name for family in families for name in facts.default_devices.get(family, ())}
        links = tuple(link for link in facts.links if link.name in devices)
        subnets = tuple(
            (link.name, ip_network(address.network))
            for link in links
            for address in link.addresses
            if not address.is_link_local
        )
        return cls(tuple(sorted(devices)), links, subnets, {link.name: link.mtu for link in facts.links})


def emit_steering(context: Context) -> SteeringProgram:
    """The egress program's input, sorted by slot; networks without `steering: direct` are not in it."""
    networks = [network for network in context.networks if network.is_direct]
    if not networks or context.facts.ebpf_refused:
        return SteeringProgram()
    down = context.facts.gateways_down
    steered = tuple(
        sorted(
            (_network(network, down.get(network.name, ())) for network in networks),
            key=lambda network: network.slot,
        )
    )
    way = _DefaultWay.of(context)
    return SteeringProgram(way.devices, steered, _passed(context, way))


def _network(network: NetworkContext, down: Collection[IPv4Address | IPv6Address]) -> SteeredNetwork:
    families = tuple(network.families(Treatment.DIRECT))
    return SteeredNetwork(
        name=network.name,
        slot=network.ids.slot,
        device=network.device,
        vips=tuple(vip for family in families for vip in network.vip_prefixes(family)),
        gateways=gateways_in_use(network.network, families, down),
        on_link=tuple(prefix for prefix in network.network.effective_on_link if prefix.version in families),
    )


def _passed(context: Context, way: _DefaultWay) -> tuple[IpNetwork, ...]:
    """Who asks from inside is answered inside: pods, services, and whatever is on the link of these devices."""
    inside = {*_LINK_ONLY, *context.policy.node.internal, *(subnet for _, subnet in way.subnets)}
    return tuple(sorted(inside, key=prefix_order))


def find_refusals(context: Context) -> tuple[Problem, ...]:
    """What this host, as it is now, keeps `steering: direct` from serving."""
    networks = [network for network in context.networks if network.is_direct]
    if not networks:
        return ()
    way = _DefaultWay.of(context)
    return tuple(problem for network in networks for problem in _network_refusals(context, way, network))


def _network_refusals(context: Context, way: _DefaultWay, network: NetworkContext) -> Iterator[Problem]:
    path: PolicyPath = ("networks", network.position)
    if context.facts.ebpf_refused:
        yield Problem(
            path,
            f"`steering: direct` needs eBPF, and this host cannot load it: {context.facts.ebpf_refused}",
            _USE_RULES,
        )
        return
    for family in network.families(Treatment.DIRECT):
        devices = context.facts.default_devices.get(family, ())
        if not devices:
            yield Problem(
                (*path, "gateways" if network.network.gateways else "gateway"),
                f"`steering: direct` sends answers off the way of the IPv{family} default route of the main table,"
                " and there is none",
                f"add a default route, or {_USE_RULES}",
            )
        if network.device in devices:
            yield Problem(
                path,
                f"`steering: direct` on {network.device}, which the IPv{family} default route leaves by itself",
                _USE_RULES,
            )
    yield from _overlaps(way, network, path)
    yield from _device_refusals(way, network, path)


def _overlaps(way: _DefaultWay, network: NetworkContext, path: PolicyPath) -> Iterator[Problem]:
    """The kernel looks for such a client on the default device's own link, where no program can help."""
    key = "on_link" if network.network.on_link else "vips"
    families = set(network.families(Treatment.DIRECT))
    for device, subnet in way.subnets:
        for prefix in network.network.effective_on_link:
            if prefix.version in families and prefix.overlaps(subnet):
                yield Problem(
                    (*path, key),
                    f"clients in {prefix} cannot be told from neighbours of {device} ({subnet}), which the default"
                    " route leaves by: `steering: direct` never sees their answers",
                    _USE_RULES,
                )


def _device_refusals(way: _DefaultWay, network: NetworkContext, path: PolicyPath) -> Iterator[Problem]:
    own = network.link
    if own is not None and own.kind in STACKED_KINDS and own.parent in way.devices:
        yield Problem(
            path,
            f"`steering: direct` by {own.name}: its packets pass {own.parent} again, where they would be steered"
            " once more",
            _USE_RULES,
        )
    mtu = _mtu(way, network)
    for link in way.links:
        if 0 < mtu < link.mtu:
            yield Problem(
                path,
                f"answers are made for the MTU of {link.name} ({link.mtu}) and would have to fit {network.device}"
                f" ({mtu}): with `steering: direct` nobody tells the sender",
                f"raise the MTU of {network.device}, or {_USE_RULES}",
            )


def _mtu(way: _DefaultWay, network: NetworkContext) -> int:
    """Of the network's device; a VLAN device that is yet to be made gets its trunk's. 0 where nothing is known."""
    if network.link is not None or network.network.vlan is None:
        return network.link.mtu if network.link else 0
    return way.mtus.get(network.network.vlan.parent, 0)


def steering_notes(context: Context, refusals: tuple[Problem, ...]) -> Iterator[Note]:
    """What a reviewer should know about the networks that are steered directly."""
    for problem in refusals:
        yield Note(NoteLevel.WARNING, _element(context, problem), problem.message)
    if not any(network.is_direct for network in context.networks):
        return
    for device, subnet in sorted(_DefaultWay.of(context).subnets, key=str):
        yield Note(
            NoteLevel.INFO,
            "steering",
            f"direct: clients in {subnet} are answered on {device}, whatever way they came in; so is everybody to"
            " whom main has a more specific route than its default one",
        )


def _element(context: Context, problem: Problem) -> str:
    position = next(part for part in problem.path if isinstance(part, int))
    return context.networks[position].origin
