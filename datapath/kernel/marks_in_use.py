# SPDX-License-Identifier: Apache-2.0
"""Which mark bits other programs on this node write: from their nftables and iptables rules.

No bit is free on every node, so an apply looks before it claims some. Only rules that are there now can
be seen; a program that starts later is found by the next look.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from datapath.kernel.rules_of_others import iptables_rules, nft_rules
from datapath.reconcile.actual import ForeignMark

_ALL_BITS = 0xFFFFFFFF
_SET_XMARK = re.compile(r"--set-xmark (?P<value>0x[0-9a-f]+)(?:/(?P<mask>0x[0-9a-f]+))?")
_CONNMARK_COPY = re.compile(r"--(?:restore|save)-mark(?P<options>(?: --(?:nf|ct|)mask 0x[0-9a-f]+)*)")


def observe_marks() -> tuple[ForeignMark, ...]:
    """Every rule of others that writes the packet or connection mark, with the bits it writes."""
    return (*_nft_marks(), *_iptables_marks())


def _nft_marks() -> Iterator[ForeignMark]:
    for rule in nft_rules():
        for expression in rule.expressions:
            bits = _written_bits(expression)
            if bits is not None:
                yield ForeignMark(rule.where, *bits)


def _written_bits(expression: dict[str, Any]) -> tuple[int, int] | None:
    """Bits set to a value that the rule chooses, and bits written at all; None for no write of a mark.

    `mark set mark | 0x4000` chooses one bit and writes one; `mark set 0x4000` chooses one and writes all.
    """
    mangle = expression.get("mangle")
    if mangle is None:
        return None
    key = mangle["key"]
    if (key.get("meta") or key.get("ct") or {}).get("key") != "mark":
        return None
    return _evaluate(mangle["value"])


def _evaluate(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, _ALL_BITS
    if isinstance(value, dict):
        ((operator, operands),) = value.items()
        if operator in {"|", "^", "&"} and isinstance(operands, list):
            constant = operands[1] if isinstance(operands[1], int) else 0
            if "key" in str(operands[0]) and not isinstance(operands[0], int):
                chosen, written = _evaluate(operands[0])
                if operator == "&":
                    return chosen & constant, written | (_ALL_BITS & ~constant)
                return chosen | constant, written | constant
        if operator in {"meta", "ct"} and operands.get("key") == "mark":
            return 0, 0
    # A map, or an expression of something else: it may write anything, but says nothing that we could compare.
    return 0, _ALL_BITS


def _iptables_marks() -> Iterator[ForeignMark]:
    for rule in iptables_rules():
        if match := _SET_XMARK.search(rule.text):
            mask = int(match["mask"], 16) if match["mask"] else _ALL_BITS
            yield ForeignMark(rule.where, int(match["value"], 16), mask)
        elif match := _CONNMARK_COPY.search(rule.text):
            masks = re.findall(r"0x[0-9a-f]+", match["options"])
            yield ForeignMark(rule.where, 0, int(masks[-1], 16) if masks else _ALL_BITS)
