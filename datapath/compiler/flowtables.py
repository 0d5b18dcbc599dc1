# SPDX-License-Identifier: Apache-2.0
"""Flowtables, of others or our own: a flow that one takes over must go on the way that we chose.

`flow add` keeps two routes: that of the packet at hand, and that of the other direction, which it looks up by the mark
of this very packet. So while a packet may meet one, it carries the mark of the other direction: that of the reply on
a request, and none on a reply. Where it leaves, a request has none again.
"""

from __future__ import annotations

from collections.abc import Iterator

from datapath.compiler.context import Context, NetworkContext
from datapath.plan.model import Note, NoteLevel
from datapath.plan.nft import FULL, BaseChain, ChainType, Hook, NftChain, NftRule

#: Before everybody who adds flows, at the forward hook; before everybody who looks at marks, at postrouting.
PRIORITY = -300


def emit_swap(context: Context, marked: list[NetworkContext], *, has_own: bool) -> list[NftChain]:
    """The chains, where there is a flowtable, of others or our own, and a mark."""
    if not (context.facts.flowtables or has_own) or not marked:
        return []
    ours = f"& {context.mask:#010x}"
    unmark = f"meta mark set meta mark & {FULL & ~context.mask:#010x}"
    return [
        NftChain(
            "forward",
            (
                NftRule(
                    f"ct mark {ours} != 0 goto swap",
                    "networks[*] beside a flowtable: both ways are looked up",
                ),
            ),
            BaseChain(ChainType.FILTER, Hook.FORWARD, PRIORITY),
        ),
        NftChain(
            "swap",
            (
                NftRule(
                    "ct direction original goto reply",
                    "networks[*] request: the way of its reply has the mark",
                ),
                *_egress_ways(context, marked),
                NftRule(unmark, "networks[*] reply: the way of its request has none"),
            ),
        ),
        NftChain(
            "postrouting",
            (
                NftRule(
                    f"meta mark {ours} != 0 ct mark {ours} != 0 ct direction original {unmark}",
                    "networks[*] request: leaves as without the policy",
                ),
            ),
            BaseChain(ChainType.FILTER, Hook.POSTROUTING, PRIORITY),
        ),
    ]


def _egress_ways(context: Context, marked: list[NetworkContext]) -> Iterator[NftRule]:
    """Of a connection that was opened from inside, it is the request that goes by the network."""
    for network in marked:
        if mark := context.egress_marks.get(network.name):
            yield NftRule(
                f"ct mark & {context.mask:#010x} == {mark:#010x}"
                f" meta mark set meta mark & {FULL & ~context.mask:#010x} | {network.ids.fwmark:#010x} return",
                f"{network.origin} egress: the way of the request has its mark",
            )


def flowtable_notes(context: Context) -> Iterator[Note]:
    """What a reviewer should know of them."""
    names = ", ".join(context.facts.flowtables)
    if not names:
        return
    if any(network.is_marked for network in context.networks):
        text = f"others have flowtables ({names}): requests carry their reply's mark where flows are added"
        yield Note(NoteLevel.INFO, "host", text)
    for network in context.networks:
        if network.is_steered and not network.is_marked:
            yield Note(
                NoteLevel.WARNING,
                network.origin,
                f"a flow that a flowtable ({names}) takes over is answered by another way: only marks are asked for"
                " there. Use `return_path: conntrack` with `steering: rules`, or keep the VIPs out of the flowtable",
            )
