# SPDX-License-Identifier: Apache-2.0
"""What `nft list` says, as libnftables gives it in JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import nftables

from datapath.kernel.bpf import Counter
from datapath.plan.nft import TABLE_FAMILY, TABLE_NAME


def list_nft(what: str, *, terse: bool = False, stateless: bool = True) -> list[dict[str, Any]]:
    """Objects with their kind; empty where it fails, which for root and a well-formed name means that it is not there.

    Args:
        what: comes after `list`.
        terse: leave out the elements of sets and maps.
        stateless: leave out what packets change, as counters.
    """
    return parse_listing(nft_text(what, terse=terse, stateless=stateless))


def nft_text(what: str, *, terse: bool = False, stateless: bool = True) -> str:
    """The same, not parsed yet."""
    nft = nftables.Nftables()
    nft.set_json_output(True)
    nft.set_stateless_output(stateless)
    nft.set_terse_output(terse)
    status, output, _ = nft.cmd(f"list {what}")
    return str(output) if status == 0 else ""


def parse_listing(text: str) -> list[dict[str, Any]]:
    """Of what `nft_text` gave."""
    items: list[dict[str, Any]] = json.loads(text)["nftables"] if text else []
    return items


def list_counters() -> Iterator[tuple[str, Counter]]:
    """Name and value of the counters of our table."""
    for item in list_nft(f"counters table {TABLE_FAMILY} {TABLE_NAME}", stateless=False):
        if counter := item.get("counter"):
            yield counter["name"], Counter(counter["packets"], counter["bytes"])
