# SPDX-License-Identifier: Apache-2.0
"""Ids read back from the comments of our table: the memory that needs no state directory.

The chain `ids` says which mask and bank of rules are in use, the set `ids` has an element a network. Before
the set there was a rule a network in the chain: both are read, so that an upgrade keeps its ids.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass

from datapath.facts import IdFacts

_NETWORK = re.compile(
    r"network=(?P<name>\S+) fwmark=(?P<fwmark>0x[0-9a-f]+) table=(?P<table>\d+)(?P<vrf> vrf)? slot=(?P<slot>\d+)"
    r"(?: zone=(?P<zone>\d+))?"
)
_HEADER = re.compile(r"fwmark_mask=(?P<mask>0x[0-9a-f]+) rule_bank=(?P<bank>[01])(?P<tree> tree)?")


@dataclass(frozen=True, slots=True)
class LiveIds:
    """What the live table says; `rule_bank` is None and the mask 0 where it says nothing."""

    ids: tuple[IdFacts, ...] = ()
    fwmark_mask: int = 0
    rule_bank: int | None = None
    has_rule_tree: bool = False


def live_ids(comments: list[str]) -> LiveIds:
    """`parse_ids`, remembered."""
    return _last_parsed(tuple(comments))


@functools.lru_cache(maxsize=1)
def _last_parsed(comments: tuple[str, ...]) -> LiveIds:
    """Kept: a set of thousands says the same at each look."""
    return parse_ids(comments)


def parse_ids(comments: Iterable[str]) -> LiveIds:
    """From the comments of chain and set `ids`. Comments that are not ours are passed over."""
    ids: list[IdFacts] = []
    mask, bank, tree = 0, None, False
    for comment in comments:
        if header := _HEADER.match(comment):
            mask, bank, tree = int(header["mask"], 16), int(header["bank"]), header["tree"] is not None
        elif network := _NETWORK.match(comment):
            ids.append(
                IdFacts(
                    name=network["name"],
                    fwmark=int(network["fwmark"], 16),
                    table=0 if network["vrf"] else int(network["table"]),
                    slot=int(network["slot"]),
                    zone=int(network["zone"] or 0),
                )
            )
    return LiveIds(tuple(ids), mask, bank, tree)
