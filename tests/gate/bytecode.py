# SPDX-License-Identifier: Apache-2.0
"""What nf_tables executes for a packet: the expressions that nft compiled, walked as `nft_do_chain` walks them.

The listing is `nft --debug=netlink`: the kernel's own bytecode is counted, not our text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

#: `inet datapath ingress`, followed by the rule's handle and the one before it where a table is listed.
_CHAIN = re.compile(r"\S+ \S+ (?P<name>[^@\s]\S*)( \d+)*\s*\Z")
_EXPRESSION = re.compile(r"\s+\[ (?P<text>.*\S)\s*\]\Z")
_LOAD = re.compile(r"(meta|ct) load (mark|direction) => reg 1\Z")
_BITWISE = re.compile(r"bitwise reg 1 = \( reg 1 & (\S+) \) \^ (\S+)\Z")
_COMPARE = re.compile(r"cmp (eq|neq) reg 1 (\S+)\Z")
_STORE = re.compile(r"(meta|ct) set mark with reg 1\Z")
_VERDICT = re.compile(r"immediate reg 0 (\w+)(?: -> (\S+))?\Z")

#: Whatever a packet is asked for besides its marks, and in which set that is looked for; 1 is "not in".
_OTHER_LOAD = re.compile(r"(.+?) => reg 1(?: , dir original)?\Z")
_COMPARE_NAME = re.compile(r"cmp (eq|neq) reg 1 (\S+)(?: 0x\S+)+\Z")
_LOOKUP = re.compile(r"lookup reg 1 set (\S+) (dreg 0 )?0x([01])\Z")
#: They count, log and translate, and go on.
_ACTS = ("objref ", "log ", "nat ", "immediate reg 1 ")
_MAP = re.compile(r"\S+ \S+ @(?P<name>\S+)")
_VERDICT_ELEMENT = re.compile(r"\s+element (?P<key>[0-9a-f]+)\s+: goto -> (?P<chain>\S+)")

Chains = Mapping[str, tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Packet:
    """What our chains look at.

    Attributes:
        direction: 0 the original one, 1 replies (`enum ip_conntrack_dir`).
        loads: what else is read of it, by the expression that does.
        sets: beginnings of the names of those that hold what is looked for in them.
    """

    mark: int = 0
    ct_mark: int = 0
    direction: int = 0
    loads: Mapping[str, int] = field(default_factory=dict)
    sets: tuple[str, ...] = ()


def parse_verdicts(listing: str) -> Mapping[str, Mapping[int, str]]:
    """Chains that verdict maps go to, by map and key."""
    maps: dict[str, dict[int, str]] = {}
    name = ""
    for line in listing.splitlines():
        if found := _MAP.match(line):
            name = found["name"]
        elif element := _VERDICT_ELEMENT.match(line):
            maps.setdefault(name, {})[int(element["key"], 16)] = element["chain"]
    return maps


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

    def __init__(
        self,
        chains: Chains,
        start: str,
        packet: Packet,
        verdicts: Mapping[str, Mapping[int, str]] | None = None,
    ) -> None:
        self._chains, self._verdicts = chains, verdicts or {}
        self.verdict = ""
        self.packet = packet
        self.expressions = 0
        self._enter(start)

    def _enter(self, chain: str) -> bool:
        """Walk a chain; True where the whole walk ended in it."""
        for rule in self._chains[chain]:
            verdict, target = self._evaluate(rule)
            if verdict in {"accept", "drop"}:
                self.verdict = verdict
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
            if verdict := _VERDICT.match(expression):
                return verdict[1], verdict[2] or ""
            if lookup := _LOOKUP.match(expression):
                target = self._look_up(lookup, register)
                if target is not None:
                    return ("goto", target) if target else ("continue", "")
            elif compare := _COMPARE.match(expression) or _COMPARE_NAME.match(expression):
                if (register == int(compare[2], 16)) != (compare[1] == "eq"):
                    return "continue", ""
            elif store := _STORE.match(expression):
                if store[1] == "meta":
                    self.packet = replace(self.packet, mark=register)
                else:
                    self.packet = replace(self.packet, ct_mark=register)
            elif not expression.startswith(_ACTS):
                register = self._computed(expression, register)
        return "continue", ""

    def _look_up(self, lookup: re.Match[str], register: int) -> str | None:
        """The chain that a verdict map leads to, empty for no match; None where a set lets the rule go on."""
        name, is_map, inverted = lookup.groups()
        if is_map:
            return self._verdicts[name].get(register, "")
        return None if name.startswith(self.packet.sets) != (inverted == "1") else ""

    def _computed(self, expression: str, register: int) -> int:
        if load := _LOAD.match(expression):
            return self._load(*load.groups())
        if bitwise := _BITWISE.match(expression):
            return register & int(bitwise[1], 16) ^ int(bitwise[2], 16)
        if other := _OTHER_LOAD.match(expression):
            return self.packet.loads[other[1]]
        raise AssertionError(f"an expression that this walk does not know: {expression}")

    def _load(self, what: str, key: str) -> int:
        return {
            ("meta", "mark"): self.packet.mark,
            ("ct", "mark"): self.packet.ct_mark,
            ("ct", "direction"): self.packet.direction,
        }[what, key]
