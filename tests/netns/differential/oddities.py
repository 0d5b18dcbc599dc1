# SPDX-License-Identifier: Apache-2.0
"""The packets on which the two backends differ: nftables sees them later, whole, and with the kernel's eyes.

The list is complete as far as generated packets can tell, and it is in docs/design/source-checks.md.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from datapath.plan.ingress import Verdict
from tests.bpf import packets
from tests.netns.differential.ground import Number
from tests.netns.differential.traffic import Sent, cut, numbered4, numbered6

#: Routed by net1, so that it may enter on net0 only with what needs no reverse path; and one routed by net0.
_ELSEWHERE, _ELSEWHERE4 = "2001:db8:ff:1::99", "172.31.1.99"
_HERE: Final = "2001:db8:ff:0::99"
_TARGET: Final = "2001:db8:ff:0::1"
_SOLICITATION: Final = bytes([135, 0, 0, 0]) + bytes(20)


@dataclass(frozen=True, slots=True)
class Oddity:
    """A packet, and what each backend counts it as; eBPF each of its fragments."""

    name: str
    sent: Sent
    ebpf: tuple[Verdict, ...]
    nft: Verdict


def _v6(number: int, bodies: Sequence[tuple[int, bytes]], source: str = _ELSEWHERE) -> Sent:
    frames = tuple(
        packets.frame(
            packets.ETH_P_IPV6,
            numbered6(packets.ipv6(source, _TARGET, body, next_header=first, hop_limit=255), number),
        )
        for first, body in bodies
    )
    return Sent(Number(6, number), "net0", frames)


def _fragment6(protocol: int, offset: int, more: bool, data: bytes) -> tuple[int, bytes]:
    return 44, struct.pack("!BBHI", protocol, 0, offset | more, 4711) + data


def _answer_in_two(number: int) -> Sent:
    """What a DHCP server sends, in two fragments."""
    frames = tuple(
        packets.frame(
            packets.ETH_P_IP,
            numbered4(
                packets.ipv4(_ELSEWHERE4, "172.31.0.1", data, fragment=0x2000 * more | offset // 8), number
            ),
        )
        for offset, more, data in cut(packets.udp(bytes(40), sport=67, dport=68))
    )
    return Sent(Number(4, number), "net0", frames)


ODDITIES: Final = (
    Oddity(
        "discovery behind an authentication header: nftables stops at that header",
        _v6(1, [(51, bytes([58, 2]) + bytes(14) + _SOLICITATION)]),
        (Verdict.PASS,),
        Verdict.RPF_STRICT,
    ),
    Oddity(
        "discovery in fragments, which nobody may send (RFC 6980): nftables sees it whole",
        _v6(2, [_fragment6(58, *part) for part in cut(_SOLICITATION)]),
        (Verdict.RPF_STRICT, Verdict.RPF_STRICT),
        Verdict.PASS,
    ),
    Oddity(
        "discovery behind the header of a fragment that is all there is (RFC 6946)",
        _v6(5, [_fragment6(58, 0, False, _SOLICITATION)]),
        (Verdict.RPF_STRICT,),
        Verdict.PASS,
    ),
    Oddity(
        "the answer of a DHCP server in fragments: only the first has the ports",
        _answer_in_two(3),
        (Verdict.PASS, Verdict.RPF_STRICT),
        Verdict.PASS,
    ),
    Oddity(
        "more extension headers than the eBPF program reads",
        _v6(
            4,
            [
                (
                    60,
                    b"".join(bytes([60, 0, 1, 4, 0, 0, 0, 0]) for _ in range(8))
                    + bytes([17, 0, 1, 4])
                    + bytes(4)
                    + packets.udp(),
                )
            ],
            _HERE,
        ),
        (Verdict.MALFORMED,),
        Verdict.PASS,
    ),
)
#: One packet of each family that `strict` drops on net0.
FROM_ELSEWHERE: Final = (
    Sent(
        Number(4, 6),
        "net0",
        (packets.frame(packets.ETH_P_IP, numbered4(packets.ipv4(_ELSEWHERE4, "172.31.0.1"), 6)),),
    ),
    _v6(7, [(17, packets.udp())]),
)
