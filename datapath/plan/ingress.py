# SPDX-License-Identifier: Apache-2.0
"""What the tc eBPF program must know: which packets belong to which network, and what may enter there.

Interface names only: `kernel/` resolves them to ifindexes.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from struct import Struct
from typing import Final

IpNetwork = IPv4Network | IPv6Network
_WORDS: Final = Struct(">8H")
#: Of an IPv6 address, the longest run of words is left out, the first of equal ones, and no single word (RFC 5952).
_ZEROS: Final = tuple(":" + "0:" * count for count in range(8, 1, -1))


def prefix_order(prefix: IpNetwork) -> tuple[int, int, int]:
    """Key to sort prefixes of both families by: a wider one comes before those inside it."""
    return prefix.version, int(prefix.network_address), prefix.prefixlen


def address_order(address: IPv4Address | IPv6Address) -> tuple[int, int]:
    """Key to sort addresses of both families by."""
    return address.version, int(address)


def address_text(address: IPv4Address | IPv6Address) -> str:
    """As `str`, in a third of the time: plans have tens of thousands."""
    packed = address.packed
    if len(packed) == 4:
        return "%d.%d.%d.%d" % tuple(packed)  # noqa: UP031  (takes the words as they come)
    text = ":%x:%x:%x:%x:%x:%x:%x:%x:" % _WORDS.unpack(packed)  # noqa: UP031
    for zeros in _ZEROS:
        if zeros in text:
            text = text.replace(zeros, "::", 1)
            break
    # The first and the last colon were only there to tell words from ends of words.
    begin, end = 0 if text.startswith("::") else 1, None if text.endswith("::") else -1
    return text[begin:end]


def prefix_text(prefix: IpNetwork) -> str:
    """As `str`; see `address_text`."""
    return f"{address_text(prefix.network_address)}/{prefix.prefixlen}"


#: Sources that are never right on a wire. Not all of the reserved ::/8: NAT64 (64:ff9b::/96) lies in it.
MARTIANS: Final[tuple[IpNetwork, ...]] = tuple(
    ip_network(text)
    for text in (
        "0.0.0.0/8",
        "127.0.0.0/8",
        "224.0.0.0/4",
        "240.0.0.0/4",  # with the broadcast address
        "::/96",  # unspecified, loopback, IPv4-compatible
        "::ffff:0:0/96",
        "ff00::/8",
    )
)


class VlanProtocol(enum.IntEnum):
    """TPID of the tag that selects a network (`linux/if_ether.h`)."""

    UNTAGGED = 0
    DOT1Q = 0x8100
    DOT1AD = 0x88A8


class VipCheck(enum.StrEnum):
    """`reverse_path.vips`: how the source of a packet to one of the network's VIPs is checked."""

    FEASIBLE = "feasible"
    STRICT = "strict"
    OFF = "off"


class OtherCheck(enum.StrEnum):
    """`reverse_path.other`: how the source of any other packet is checked."""

    STRICT = "strict"
    LOOSE = "loose"
    OFF = "off"


class Verdict(enum.IntEnum):
    """What becomes of a packet; everything but `PASS` is dropped. The one list of names.

    The number is the index of its counter; `bpf/abi.h` has the same list and is checked against this one.
    """

    PASS = 0
    MALFORMED = 1
    MARTIAN = 2
    SPOOFED = 3
    VIP_UNREACHABLE = 4
    VIP_STRICT = 5
    RPF_STRICT = 6
    RPF_LOOSE = 7

    @property
    def label(self) -> str:
        """The name that people see, for example ``vip_unreachable``."""
        return self.name.lower()


class SourceAction(enum.StrEnum):
    """What the longest matching source prefix says."""

    ALLOW = "allow"
    DENY = "deny"


@dataclass(frozen=True, slots=True, order=True)
class IngressPoint:
    """Where a network's packets are first seen: a device, and the outermost tag they carry there.

    Attributes:
        ifname: the device that the program is attached to: the network's own, or its trunk.
        vlan_protocol: TPID of the outermost tag, `UNTAGGED` where the device itself is the network.
        vlan_id: 1..4094, or 0 with `UNTAGGED`.
    """

    ifname: str
    vlan_protocol: VlanProtocol = VlanProtocol.UNTAGGED
    vlan_id: int = 0


@dataclass(frozen=True, slots=True)
class SourceRule:
    """One prefix of a network's source list; the longest match decides.

    Attributes:
        origin: the policy element that asked for it, for `explain`.
    """

    prefix: IpNetwork
    action: SourceAction
    origin: str = ""


@dataclass(frozen=True, slots=True)
class IngressNetwork:
    """One network as the program sees it.

    Attributes:
        name: the policy's name.
        slot: index of its counters and of its prefixes in the tries, 1..65535.
        fwmark: value (inside the mask) that its packets get; 0 leaves the mark alone (the network is
            only checked, not steered).
        point: where its packets are first seen.
        device: where the IP stack sees them: what a reverse-path lookup must answer.
        vips: the prefixes served here.
        feasible: prefixes that the network's own table can reach. `VipCheck.FEASIBLE` asks these alone,
            `STRICT` asks these and then the kernel's tables: list them there exactly when the reply will
            carry the mark that leads to that table.
        check_martians: drop sources that can never be right (design: `martian`).
        check_sources: ask the source lists (own and common); without it nothing is `spoofed`.
    """

    name: str
    slot: int
    fwmark: int
    point: IngressPoint
    device: str
    vips: tuple[IpNetwork, ...] = ()
    vip_check: VipCheck = VipCheck.OFF
    other_check: OtherCheck = OtherCheck.OFF
    sources: tuple[SourceRule, ...] = ()
    feasible: tuple[IpNetwork, ...] = ()
    check_martians: bool = False
    check_sources: bool = False

    @property
    def is_checked(self) -> bool:
        """Whether any check may drop a packet of this network."""
        return (
            self.check_martians
            or self.check_sources
            or self.vip_check is not VipCheck.OFF
            or self.other_check is not OtherCheck.OFF
        )


@dataclass(frozen=True, slots=True)
class IngressProgram:
    """Everything the program needs. No networks: nothing is attached.

    Attributes:
        fwmark_mask: the only bits of the packet mark that the program may write.
        networks: no two with the same point.
        common_sources: source rules of every network with `check_sources`. The longest match of both lists
            decides; the network's own wins a tie. Kept once: N networks that deny each other's VIPs would
            otherwise need N * N prefixes.
    """

    fwmark_mask: int
    networks: tuple[IngressNetwork, ...] = field(default=())
    common_sources: tuple[SourceRule, ...] = ()

    @property
    def attachments(self) -> tuple[str, ...]:
        """Devices that carry the program, sorted, each once: a trunk serves all its VLANs."""
        return tuple(sorted({n.point.ifname for n in self.networks}))
