# SPDX-License-Identifier: Apache-2.0
"""Which mark bits other programs on this node write: from their nftables and iptables rules.

No bit is free on every node, so an apply looks before it claims some. Only rules that are there now can
be seen; a program that starts later is found by the next look.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import nftables

from datapath.log import get_logger
from datapath.plan.nft import TABLE_FAMILY, TABLE_NAME
from datapath.reconcile.actual import ForeignMark

_ALL_BITS = 0xFFFFFFFF
_TIMEOUT_S = 20
#: Both flavours may hold rules at the same time; a program that is not installed has none of its own.
_IPTABLES = ("iptables-legacy-save", "ip6tables-legacy-save", "iptables-nft-save", "ip6tables-nft-save")
_SET_XMARK = re.compile(r"--set-xmark (?P<value>0x[0-9a-f]+)(?:/(?P<mask>0x[0-9a-f]+))?")
_CONNMARK_COPY = re.compile(r"--(?:restore|save)-mark(?P<options>(?: --(?:nf|ct|)mask 0x[0-9a-f]+)*)")


def observe_marks() -> tuple[ForeignMark, ...]:
    """Every rule of others that writes the packet or connection mark, with the bits it writes."""
    return (*_nft_marks(), *_iptables_marks())


def _nft_marks() -> Iterator[ForeignMark]:
    nft = nftables.Nftables()
    nft.set_json_output(True)
    nft.set_stateless_output(True)
    nft.set_terse_output(True)
    status, output, _ = nft.cmd("list ruleset")
    if status != 0 or not output:
        return
    for item in json.loads(output)["nftables"]:
        rule = item.get("rule")
        if rule is None or (rule["family"], rule["table"]) == (TABLE_FAMILY, TABLE_NAME):
            continue
        for expression in rule["expr"]:
            bits = _written_bits(expression)
            if bits is not None:
                where = f"nft table {rule['family']} {rule['table']}, chain {rule['chain']}"
                yield ForeignMark(where, *bits)


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
    for program in _IPTABLES:
        if shutil.which(program) is None:
            continue
        try:
            done = subprocess.run([program], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            get_logger().warning("marks_not_read", program=program, reason=str(error))
            continue
        if done.returncode != 0:
            # Not the same as "no rules": a collision there would go unseen.
            get_logger().warning("marks_not_read", program=program, reason=done.stderr.strip())
        yield from parse_iptables_save(program.removesuffix("-save"), done.stdout)


def parse_iptables_save(program: str, text: str) -> Iterator[ForeignMark]:
    """Rules of `iptables-save` that write a mark."""
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        if not line.startswith("-A"):
            continue
        chain = line.split()[1]
        where = f"{program} table {table}, chain {chain}"
        if match := _SET_XMARK.search(line):
            mask = int(match["mask"], 16) if match["mask"] else _ALL_BITS
            yield ForeignMark(where, int(match["value"], 16), mask)
        elif match := _CONNMARK_COPY.search(line):
            masks = re.findall(r"0x[0-9a-f]+", match["options"])
            yield ForeignMark(where, 0, int(masks[-1], 16) if masks else _ALL_BITS)
