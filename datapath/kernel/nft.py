# SPDX-License-Identifier: Apache-2.0
"""Our table, listed by libnftables."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from ipaddress import ip_address
from typing import Any, Final

from datapath.kernel.nft_listing import nft_text, parse_listing
from datapath.kernel.recall import Recall
from datapath.plan.nft import IDS, BaseChain, ChainType, Hook, digest_in_comment
from datapath.reconcile.actual import ActualChain, ActualMap, ActualTable

#: What our table was at the last look.
_LAST: Final[Recall[tuple[ActualTable, list[str]]]] = Recall()


def list_table(family: str, name: str) -> tuple[ActualTable, list[str]] | None:
    """Our table, and the comments that hold ids; None where there is no such table."""
    text = nft_text(f"table {family} {name}")
    digest = hashlib.blake2b(text.encode()).digest()
    known = _LAST.of(digest)
    if known is not None:
        return known
    items = parse_listing(text)
    if not items:
        return None
    found = parse_table(items)
    _LAST.keep(digest, found)
    return found


def parse_table(items: Iterable[dict[str, Any]]) -> tuple[ActualTable, list[str]]:
    """From libnftables' JSON to our nouns."""
    bases: dict[str, BaseChain | None] = {}
    digests: dict[str, list[str | None]] = {}
    maps: dict[str, ActualMap] = {}
    ids: list[str] = []
    counters: set[str] = set()
    flowtables: dict[str, frozenset[str]] = {}
    for item in items:
        if "chain" in item:
            chain = item["chain"]
            bases[chain["name"]] = _base_chain(chain)
            digests.setdefault(chain["name"], [])
        elif "rule" in item:
            rule = item["rule"]
            comment = rule.get("comment")
            digests.setdefault(rule["chain"], []).append(digest_in_comment(comment))
            if rule["chain"] == IDS and comment:
                ids.append(comment)
        elif "counter" in item:
            counters.add(item["counter"]["name"])
        elif "flowtable" in item:
            flowtables[item["flowtable"]["name"]] = _devices(item["flowtable"])
        elif "map" in item or "set" in item:
            body = item.get("map") or item["set"]
            maps[body["name"]] = _map(body)
            if body["name"] == IDS:
                ids += maps[IDS].elements.values()
    chains = {name: ActualChain(tuple(digests[name]), base) for name, base in bases.items()}
    return ActualTable(chains, maps, frozenset(counters), flowtables), ids


def _devices(flowtable: dict[str, Any]) -> frozenset[str]:
    """One is listed by its name alone, none not at all."""
    devices = flowtable.get("dev", [])
    return frozenset([devices] if isinstance(devices, str) else devices)


def _base_chain(chain: dict[str, Any]) -> BaseChain | None:
    if "hook" not in chain:
        return None
    try:
        return BaseChain(ChainType(chain["type"]), Hook(chain["hook"]), chain["prio"])
    except ValueError:
        # A hook or type that we never use: certainly not as desired.
        return BaseChain(ChainType.FILTER, Hook.INPUT, 0x7FFFFFFF)


def _map(body: dict[str, Any]) -> ActualMap:
    key_type = _named_type(body["type"])
    elements = dict(_element(element, key_type) for element in body.get("elem", []))
    return ActualMap(
        key_type, _named_type(body.get("map", "")), elements, tuple(sorted(body.get("flags", [])))
    )


def _named_type(kind: Any) -> str:
    """A type, or what newer nft lists in its place: the expression that a map was declared with."""
    if isinstance(kind, str):
        return kind
    expression: dict[str, dict[str, str]] = kind.get("typeof", kind)
    key = next(iter(expression.values()), {}).get("key", "")
    return {"iifname": "ifname", "zone": "integer"}.get(key, key)


def _element(element: Any, key_type: str) -> tuple[str, str]:
    key, value = element if isinstance(element, list) else (element, None)
    comment = ""
    if isinstance(key, dict) and "elem" in key:
        comment = key["elem"].get("comment", "")
        key = key["elem"]["val"]
    return _key(key, key_type), comment if value is None else _verdict(value)


def _key(key: Any, key_type: str) -> str:
    """As `plan.nft` writes it, whatever form the listing chose."""
    if isinstance(key, dict) and "prefix" in key:
        return f"{ip_address(key['prefix']['addr'])}/{key['prefix']['len']}"
    if isinstance(key, dict) and "range" in key:
        return "-".join(str(ip_address(end)) for end in key["range"])
    if key_type in {"ipv4_addr", "ipv6_addr"}:
        # nft and Python write some addresses differently (::ffff:0.0.0.0): both sides go through Python.
        return str(ip_address(key))
    if key_type == "mark":
        return f"{key:#010x}"
    return f'"{key}"' if key_type == "ifname" else str(key)


def _verdict(value: Any) -> str:
    if isinstance(value, dict):
        ((verb, body),) = value.items()
        return f"{verb} {body['target']}" if body else str(verb)
    return str(value)
