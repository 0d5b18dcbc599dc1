# SPDX-License-Identifier: Apache-2.0
"""Everybody's nftables and iptables rules but ours: who else writes marks, who else uses zones.

Listing them is dear on a large node: only before something is claimed, and for `doctor`.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, NamedTuple

from datapath.kernel.nft_listing import list_nft
from datapath.log import get_logger
from datapath.plan.nft import TABLE_FAMILY, TABLE_NAME

_TIMEOUT_S = 20
#: Both flavours may hold rules at the same time; a program that is not installed has none of its own.
_IPTABLES = ("iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save")


class NftRuleOfOthers(NamedTuple):
    """One nftables rule.

    Attributes:
        where: table and chain, for messages.
        table: its family and name.
        expressions: as libnftables lists them.
    """

    where: str
    table: tuple[str, str]
    expressions: list[dict[str, Any]]


class IptablesRule(NamedTuple):
    """One line of `iptables-save`."""

    where: str
    text: str


def nft_rules() -> Iterator[NftRuleOfOthers]:
    """All nftables rules of others; none where they cannot be listed."""
    for item in list_nft("ruleset", terse=True):
        rule = item.get("rule")
        if rule is not None and (rule["family"], rule["table"]) != (TABLE_FAMILY, TABLE_NAME):
            where = f"nft table {rule['family']} {rule['table']}, chain {rule['chain']}"
            yield NftRuleOfOthers(where, (rule["family"], rule["table"]), rule["expr"])


def source_nat_chains() -> Iterator[tuple[str, int]]:
    """Where others translate sources with nftables, and at which priority; the first that does decides."""
    for item in list_nft("chains", terse=True):
        chain = item.get("chain", {})
        if (chain.get("type"), chain.get("hook")) != ("nat", "postrouting"):
            continue
        if (chain["family"], chain["table"]) != (TABLE_FAMILY, TABLE_NAME):
            yield f"nft table {chain['family']} {chain['table']}, chain {chain['name']}", int(chain["prio"])


def iptables_rules() -> Iterator[IptablesRule]:
    """All rules of both flavours and families."""
    for program in _IPTABLES:
        if shutil.which(program) is None:
            continue
        try:
            done = subprocess.run([program], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            get_logger().warning("iptables_not_read", program=program, reason=str(error))
            continue
        if done.returncode != 0:
            # Not the same as "no rules": a collision there would go unseen.
            get_logger().warning("iptables_not_read", program=program, reason=done.stderr.strip())
        yield from parse_iptables_save(program.removesuffix("-save"), done.stdout)


def parse_iptables_save(program: str, text: str) -> Iterator[IptablesRule]:
    """Rules of `iptables-save`, each with its place."""
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        if line.startswith("-A"):
            yield IptablesRule(f"{program} table {table}, chain {line.split()[1]}", line)
