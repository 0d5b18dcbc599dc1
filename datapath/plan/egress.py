# SPDX-License-Identifier: Apache-2.0
"""Connections that leave by a network: what status, metrics and the reconciliation must know of them.

What is done about their packets is in the nftables table; here are the names that are agreed upon.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from datapath.plan.ingress import IpNetwork, prefix_order
from datapath.plan.rtnl import Family

#: Map from the mark of a connection to what becomes of its packets: its keys are the marks that are in use.
NETWORKS_MAP = "egress-networks"
#: Marks whose connections are closed, for the length of one change.
RETIRED_SET = "egress-retired"
#: Elements of one set that an external program may name.
MEMBERS_MAX = 16_384


class EgressDrop(enum.StrEnum):
    """Why a packet was dropped rather than let out by the wrong way or with the wrong address."""

    #: Routed to another device than the network's: its rule or route is missing.
    WRONG_DEVICE = "wrong_device"
    #: It has no source address of the entry: nobody translated it, or somebody else did.
    UNTRANSLATED = "untranslated"
    #: First packet of a connection, routed before its source became an egress source.
    LATE = "late"
    #: It belongs to no connection (invalid, or not tracked), so it cannot be translated.
    UNTRACKED = "untracked"
    #: `source_ip: network`, and the device has no address of that family.
    NO_ADDRESS = "no_address"


#: Those that are counted for a network; the others for an entry.
NETWORK_DROPS = (EgressDrop.WRONG_DEVICE, EgressDrop.UNTRANSLATED)
ENTRY_DROPS = (EgressDrop.LATE, EgressDrop.UNTRACKED)
OPENED = "opened"
#: What the name of every such counter begins with.
EGRESS_COUNTER = "egress"
#: Of nfnetlink_log, where dropped packets go while somebody watches: 0x6470, "dp".
LOG_GROUP = 25_712


def egress_name(network: str) -> str:
    """Whose mark the connections carry; no network has a name with a dot."""
    return f"{network}.egress"


def counter_name(owner: str, what: str) -> str:
    """Name of the counter object of an entry or a network."""
    return f"{EGRESS_COUNTER}.{owner}.{what}"


def owner_and_drop(name: str) -> tuple[str, EgressDrop] | None:
    """The entry or network of a counter's name and why its packets are dropped; None for other names."""
    kind, _, rest = name.partition(".")
    owner, _, what = rest.rpartition(".")
    return (owner, EgressDrop(what)) if kind == EGRESS_COUNTER and what in set(map(str, EgressDrop)) else None


def members_set(entry: str, family: int) -> str:
    """Name of the set that an external program fills."""
    return f"members{family}.{entry}"


def member_text(member: IpNetwork) -> str:
    """As people write it, and as nft lists it: an address has no length."""
    return str(member.network_address) if member.prefixlen == member.max_prefixlen else str(member)


def member_elements(members: Iterable[IpNetwork], family: Family) -> tuple[tuple[str, str], ...]:
    """Addresses and prefixes of one family as the elements of that set, sorted.

    One element a member, never joined: a member that stays must not be taken out and put in again with another.
    """
    mine = sorted((member for member in members if member.version == family), key=prefix_order)
    return tuple((member_text(prefix), "") for prefix in mine)


@dataclass(frozen=True, slots=True)
class EgressEntry:
    """One entry of the policy.

    Attributes:
        sources: prefixes of the policy.
        members: of its set; None where it has none.
        families: in which it works.
        addresses: that its connections get; none for a family means that they are dropped.
    """

    name: str
    network: str
    device: str
    sources: tuple[IpNetwork, ...]
    members: tuple[IpNetwork, ...] | None
    families: tuple[Family, ...]
    addresses: tuple[IPv4Address | IPv6Address, ...]

    def lacks_address(self, family: Family) -> bool:
        """Its connections of that family are dropped."""
        return family in self.families and not any(a.version == family for a in self.addresses)
