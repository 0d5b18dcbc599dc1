# SPDX-License-Identifier: Apache-2.0
"""What every compiler module may read: the policy, the host's facts, and what each network needs.

How a network is treated follows from its gateway, family by family: without one, its VIPs are
reached on the link (or need nothing at all), with one its replies are steered.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType

from datapath.compiler.kept import Kept
from datapath.facts import Facts, LinkFacts
from datapath.plan.ingress import IngressPoint, IpNetwork
from datapath.plan.model import NetworkIds
from datapath.plan.rtnl import Family
from datapath.policy import Network, Policy
from datapath.policy.model import ReturnPath, Steering


class Treatment(enum.StrEnum):
    """What is done about one network in one family."""

    NOTHING = "nothing"
    ON_LINK = "on-link"
    SOURCE = "source"
    CONNTRACK = "conntrack"
    DIRECT = "direct"
    NONE = "none"


#: Treatments that route replies by a table of their own.
ROUTED = frozenset({Treatment.SOURCE, Treatment.CONNTRACK})
#: Treatments that send replies to the network they belong to.
STEERED = ROUTED | {Treatment.DIRECT}
_FAMILIES = tuple(Family)


@dataclass(frozen=True, slots=True)
class NetworkContext:
    """One network of the policy with what follows from the facts.

    Attributes:
        position: index in the policy's list, for error positions.
        device: the device that the IP stack sees its packets on.
        link: facts of that device, None where the host has none (yet).
        treatments: what is done about it, by family.
    """

    network: Network
    position: int
    link: LinkFacts | None
    treatments: Mapping[Family, Treatment]
    ids: NetworkIds

    @property
    def name(self) -> str:
        return self.network.name

    @property
    def origin(self) -> str:
        """The policy element, as it stands in comments."""
        return f"networks[{self.network.name}]"

    @property
    def device(self) -> str:
        return self.network.device

    @property
    def point(self) -> IngressPoint:
        """Where the eBPF program sees this network first: a trunk serves all its VLANs at once."""
        vlan = self.network.vlan
        if vlan is None:
            return IngressPoint(self.device)
        return IngressPoint(vlan.parent, vlan.protocol, vlan.id)

    def families(self, *treatments: Treatment) -> Iterator[Family]:
        for family, treatment in self.treatments.items():
            if treatment in treatments:
                yield family

    @property
    def is_marked(self) -> bool:
        return Treatment.CONNTRACK in self.treatments.values()

    @property
    def is_direct(self) -> bool:
        return Treatment.DIRECT in self.treatments.values()

    @property
    def is_steered(self) -> bool:
        return not STEERED.isdisjoint(self.treatments.values())

    @property
    def is_checked(self) -> bool:
        """Sources are checked wherever we take the kernel's own check away, or the policy asks for it."""
        return self.is_steered or "reverse_path" in self.network.model_fields_set

    def vip_prefixes(self, family: Family) -> tuple[IpNetwork, ...]:
        return tuple(prefix for prefix in self.network.vip_prefixes if prefix.version == family)


@dataclass(frozen=True)
class Context:
    """The whole input of the compiler.

    Attributes:
        ids: of networks, and of the connections that leave by one.
        egress_marks: of the connections that leave by a network, by its name.
        kept: of the compile before.
        unchanged: names of networks of which everything is as it was then, their place in the policy left aside.
        unchanged_links: names of devices whose facts are as they were then.
    """

    policy: Policy
    facts: Facts
    mask: int
    networks: tuple[NetworkContext, ...]
    ids: tuple[NetworkIds, ...] = ()
    egress_marks: Mapping[str, int] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)
    unchanged: frozenset[str] = frozenset()
    unchanged_links: frozenset[str] = frozenset()

    @property
    def named(self) -> Iterator[tuple[str, NetworkContext]]:
        """The networks by name, as `kept` takes them."""
        return ((network.name, network) for network in self.networks)


def treat(network: Network, link: LinkFacts | None, steering: Steering) -> Mapping[Family, Treatment]:
    """The treatment of each family in which the network has VIPs."""
    treatments: dict[Family, Treatment] = {}
    for family in _FAMILIES:
        vips = [prefix for prefix in network.vip_prefixes if prefix.version == family]
        if not vips:
            continue
        if network.is_routed(family):
            direct = steering is Steering.DIRECT and network.return_path is not ReturnPath.NONE
            treatments[family] = Treatment.DIRECT if direct else Treatment(network.return_path)
        elif network.return_path is ReturnPath.NONE:
            treatments[family] = Treatment.NONE
        elif all(on_own_subnet(vip, link) for vip in vips):
            treatments[family] = Treatment.NOTHING
        else:
            treatments[family] = Treatment.ON_LINK
    return _one_of(tuple(treatments.items()))


@cache
def _one_of(treatments: tuple[tuple[Family, Treatment], ...]) -> Mapping[Family, Treatment]:
    """There are a dozen, and thousands of networks."""
    return MappingProxyType(dict(treatments))


def on_own_subnet(prefix: IpNetwork, link: LinkFacts | None) -> IpNetwork | None:
    """The subnet of one of the device's addresses that holds the prefix, if any."""
    if link is None:
        return None
    for address in link.addresses:
        subnet = address.network
        if subnet.version == prefix.version and prefix.subnet_of(subnet):  # type: ignore[arg-type]
            return subnet
    return None
