# SPDX-License-Identifier: Apache-2.0
"""What nf_tables executes for a packet: the expressions that nft compiled, walked as `nft_do_chain` walks them.

The listing is `nft --debug=netlink`: the kernel's own bytecode is counted, not our text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

#: `inet datapath ingress`, followed by the rule's handle and the one before it where a table is listed.
_CHAIN = re.compile(r"\S+ \S+ (?P<name>[^@\s]\S*)( \d+)*\s*\Z")
_EXPRESSION = re.compile(r"\s+\[ (?P<text>.*\S)\s*\]\Z")
_LOAD = re.compile(r"(meta|ct) load (\S+) => reg 1\Z")
_BITWISE = re.compile(r"bitwise reg 1 = \( reg 1 & (\S+) \) \^ (\S+)\Z")
_COMPARE = re.compile(r"cmp (eq|neq) reg 1 (\S+)\Z")
_STORE = re.compile(r"(meta|ct) set mark with reg 1\Z")
_VERDICT = re.compile(r"immediate reg 0 (\w+)(?: -> (\S+))?\Z")

Chains = Mapping[str, tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Packet:
    """What our chains look at. `direction`: 0 the original one, 1 replies (`enum ip_conntrack_dir`)."""

    mark: int = 0
    ct_mark: int = 0
    direction: int = 0


def parse(listing: str) -> Chains:
    """Rules of each chain, each a tuple of expressions."""
    chains: dict[str, list[list[str]]] = {}
    rule: list[str] = []
    for line in listing.splitlines():
        if expression := _EXPRESSION.match(line):
            rule.append(expression["text"])
        elif chain := _CHAIN.match(line):
            rule = []
            chains.setdefault(chain["name"], []).append(rule)
    return {name: tuple(map(tuple, rules)) for name, rules in chains.items()}


class Walk:
    """One packet through one base chain.

    Attributes:
        packet: as it leaves the chain.
        expressions: how many were evaluated, the last one of a rule that did not match included.
    """

    def __init__(self, chains: Chains, start: str, packet: Packet) -> None:
        self._chains = chains
        self.packet = packet
        self.expressions = 0
        self._enter(start)

    def _enter(self, chain: str) -> bool:
        """Walk a chain; True where the whole walk ended in it."""
        for rule in self._chains[chain]:
            verdict, target = self._evaluate(rule)
            if verdict in {"accept", "drop"}:
                return True
            if verdict == "return":
                return False
            if verdict == "goto":
                return self._enter(target)
            if verdict == "jump" and self._enter(target):
                return True
        return False

    def _evaluate(self, rule: tuple[str, ...]) -> tuple[str, str]:
        register = 0
        for expression in rule:
            self.expressions += 1
            if load := _LOAD.match(expression):
                register = self._load(*load.groups())
            elif bitwise := _BITWISE.match(expression):
                register = register & int(bitwise[1], 16) ^ int(bitwise[2], 16)
            elif compare := _COMPARE.match(expression):
                if (register == int(compare[2], 16)) != (compare[1] == "eq"):
                    return "continue", ""
            elif store := _STORE.match(expression):
                field = "mark" if store[1] == "meta" else "ct_mark"
                self.packet = replace(self.packet, **{field: register})
            elif verdict := _VERDICT.match(expression):
                return verdict[1], verdict[2] or ""
            else:
                raise AssertionError(f"an expression that this walk does not know: {expression}")
        return "continue", ""

    def _load(self, what: str, key: str) -> int:
        return {
            ("meta", "mark"): self.packet.mark,
            ("ct", "mark"): self.packet.ct_mark,
            ("ct", "direction"): self.packet.direction,
        }[what, key]
