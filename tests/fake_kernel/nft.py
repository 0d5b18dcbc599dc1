# SPDX-License-Identifier: Apache-2.0
"""Our nftables table: the commands that our engine writes, all or nothing, and who refers to whom.

Not nft: a rule is its digest, its comment and the names it refers to. That is enough for what the kernel refuses.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from datapath.plan.nft import IDS, BaseChain, ChainType, Hook, digest_in_comment
from datapath.reconcile.actual import ActualChain, ActualMap, ActualTable
from tests.fake_kernel.refusal import refuse

_COMMAND = re.compile(r"(?P<verb>\w+) (?P<noun>\w+) inet datapath(?: (?P<rest>.*))?\Z")
_BASE = re.compile(r"type (?P<type>\w+) hook (?P<hook>\w+) priority (?P<priority>-?\d+);")
_TYPE = re.compile(r"type (?P<key>[^:;]+?)(?: : (?P<value>\w+))?;(?: flags (?P<flags>[^;]+);)?")
_ELEMENT = re.compile(r'("[^"]*"|[^ ,{}"]+)(?: : ([^,{}]*[^ ,{}])| comment "([^"]*)")?')
_DEVICES = re.compile(r"devices = \{ (?P<names>[^}]*) \}")
_COMMENT = re.compile(r' comment "([^"]*)"\Z')
_REFERENCES = {
    "chain": re.compile(r"\b(?:jump|goto) ([^\s,}]+)"),
    "map": re.compile(r"(?<!flow add )@(\S+)"),
    "flowtable": re.compile(r"flow add @(\S+)"),
    "counter": re.compile(r'counter name "([^"]+)"'),
}


@dataclass(frozen=True)
class Rule:
    """What others may not take away while it is there, by noun; and how it is known."""

    comment: str
    references: frozenset[tuple[str, str]]


@dataclass(frozen=True)
class Chain:
    base: BaseChain | None
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Map:
    key_type: str
    value_type: str
    flags: tuple[str, ...]
    elements: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Table:
    """One table; its chains and maps are values, so a copy is cheap."""

    chains: dict[str, Chain] = field(default_factory=dict)
    maps: dict[str, Map] = field(default_factory=dict)
    counters: set[str] = field(default_factory=set)
    flowtables: dict[str, frozenset[str]] = field(default_factory=dict)

    def copy(self) -> Table:
        return Table(dict(self.chains), dict(self.maps), set(self.counters), dict(self.flowtables))

    def references(self) -> Iterator[tuple[str, str]]:
        for chain in self.chains.values():
            for rule in chain.rules:
                yield from rule.references
        for item in self.maps.values():
            if item.value_type:
                for value in item.elements.values():
                    yield from _references(value)


def _references(text: str) -> frozenset[tuple[str, str]]:
    return frozenset((noun, name) for noun, pattern in _REFERENCES.items() for name in pattern.findall(text))


class Nft:
    """nf_tables with our table, or without."""

    def __init__(self, devices: Container[str] = ()) -> None:
        self.table: Table | None = None
        #: That a flowtable can have.
        self.devices = devices

    def apply(self, text: str) -> None:
        """One transaction."""
        before, self.table = self.table, self.table and self.table.copy()
        try:
            for line in text.splitlines():
                self._command(line)
        except BaseException:
            self.table = before
            raise

    def check(self, text: str) -> None:
        """The same without doing it."""
        before = self.table
        self.apply(text)
        self.table = before

    def observe(self) -> tuple[ActualTable, list[str]] | None:
        """What `kernel.nft.list_table` returns."""
        if self.table is None:
            return None
        chains = {
            name: ActualChain(tuple(digest_in_comment(rule.comment) for rule in chain.rules), chain.base)
            for name, chain in self.table.chains.items()
        }
        maps = {
            name: ActualMap(item.key_type, item.value_type, dict(item.elements), item.flags)
            for name, item in self.table.maps.items()
        }
        ids = [rule.comment for rule in self.table.chains.get(IDS, Chain(None)).rules]
        if IDS in maps:
            ids += maps[IDS].elements.values()
        return ActualTable(chains, maps, frozenset(self.table.counters), dict(self.table.flowtables)), ids

    def drop_device(self, name: str) -> None:
        """A device goes: flowtables forget it."""
        if self.table is not None:
            self.table.flowtables = {key: names - {name} for key, names in self.table.flowtables.items()}

    def _command(self, line: str) -> None:
        match = _COMMAND.match(line)
        assert match, f"our engine never wrote this before: {line}"
        verb, noun, rest = match["verb"], match["noun"], match["rest"] or ""
        if noun == "table":
            self._table_command(verb)
            return
        if self.table is None:
            raise _refused(errno.ENOENT)
        name, _, body = rest.partition(" ")
        if noun == "flowtable" and body:
            self._change_flowtable(self.table, verb, name, body)
        elif verb == "add":
            _add(self.table, noun, name, body)
        elif noun == "element":
            _delete_elements(self.table, name, body)
        elif verb == "flush":
            _flush(self.table, noun, name)
        else:
            assert verb == "delete", line
            _delete(self.table, noun, name)

    def _change_flowtable(self, table: Table, verb: str, name: str, body: str) -> None:
        match = _DEVICES.search(body)
        devices = frozenset(item.strip('"') for item in match["names"].split(", ")) if match else frozenset()
        present = table.flowtables.get(name, frozenset())
        if verb == "delete":
            if name not in table.flowtables or not devices <= present:
                raise _refused(errno.ENOENT)
            table.flowtables[name] = present - devices
            return
        if any(device not in self.devices for device in devices):
            raise _refused(errno.ENOENT)
        others = [names for key, names in table.flowtables.items() if key != name]
        if any(devices & names for names in others):
            raise _refused(errno.EEXIST)
        table.flowtables[name] = present | devices

    def _table_command(self, verb: str) -> None:
        if verb == "add":
            self.table = self.table or Table()
        elif self.table is None:
            raise _refused(errno.ENOENT)
        else:
            self.table = None


def _refused(code: int) -> Exception:
    return refuse("apply the nft file", code)


def _add(table: Table, noun: str, name: str, body: str) -> None:
    if noun == "counter":
        table.counters.add(name)
    elif noun == "chain":
        base = _base(body)
        if table.chains.setdefault(name, Chain(base)).base != base and base is not None:
            raise _refused(errno.EEXIST)
    elif noun in ("map", "set"):
        made = _map(body)
        present = table.maps.setdefault(name, made)
        if (present.key_type, present.value_type, present.flags) != (
            made.key_type,
            made.value_type,
            made.flags,
        ):
            raise _refused(errno.EEXIST)
    elif noun == "rule":
        _add_rule(table, name, body)
    else:
        assert noun == "element"
        _add_elements(table, name, body)


def _base(body: str) -> BaseChain | None:
    match = _BASE.search(body)
    return match and BaseChain(ChainType(match["type"]), Hook(match["hook"]), int(match["priority"]))


def _map(body: str) -> Map:
    # The types that nft lists for the expressions of a declaration.
    match = _TYPE.search(body.replace("typeof iifname : ct zone", "type ifname : integer"))
    assert match, body
    flags = tuple(sorted((match["flags"] or "").split(", "))) if match["flags"] else ()
    return Map(match["key"], match["value"] or "", flags)


def _add_rule(table: Table, chain: str, body: str) -> None:
    if chain not in table.chains:
        raise _refused(errno.ENOENT)
    comment = _COMMENT.search(body)
    rule = Rule(comment[1] if comment else "", _references(_COMMENT.sub("", body)))
    _require(table, rule.references)
    table.chains[chain] = replace(table.chains[chain], rules=(*table.chains[chain].rules, rule))


def _require(table: Table, references: frozenset[tuple[str, str]]) -> None:
    present: dict[str, Container[str]] = {
        "chain": table.chains,
        "map": table.maps,
        "counter": table.counters,
        "flowtable": table.flowtables,
    }
    if any(name not in present[noun] for noun, name in references):
        raise _refused(errno.ENOENT)


def _elements(body: str) -> list[tuple[str, str]]:
    return [(key, value or comment) for key, value, comment in _ELEMENT.findall(body)]


def _add_elements(table: Table, name: str, body: str) -> None:
    if name not in table.maps:
        raise _refused(errno.ENOENT)
    item = table.maps[name]
    elements = dict(item.elements)
    # No time passes here.
    for key, value in _elements(re.sub(r" timeout \d+s", "", body)):
        if item.value_type:
            _require(table, _references(value))
            if elements.get(key, value) != value:
                raise _refused(errno.EEXIST)
        if key not in elements and "interval" in item.flags and _overlaps(key, elements):
            raise _refused(errno.EEXIST)
        elements.setdefault(key, value)
    table.maps[name] = replace(item, elements=elements)


def _overlaps(key: str, present: Mapping[str, str]) -> bool:
    first, last = _ends(key)
    return any(first <= end and start <= last for start, end in map(_ends, present))


def _ends(key: str) -> tuple[int, int]:
    if "/" in key:
        network = ip_network(key)
        return int(network[0]), int(network[-1])
    start, _, end = key.partition("-")
    addresses: list[IPv4Address | IPv6Address] = [ip_address(start), ip_address(end or start)]
    return int(addresses[0]), int(addresses[1])


def _delete_elements(table: Table, name: str, body: str) -> None:
    if name not in table.maps:
        raise _refused(errno.ENOENT)
    elements = dict(table.maps[name].elements)
    for key, _ in _elements(body):
        if elements.pop(key, None) is None:
            raise _refused(errno.ENOENT)
    table.maps[name] = replace(table.maps[name], elements=elements)


def _flush(table: Table, noun: str, name: str) -> None:
    if noun == "chain" and name in table.chains:
        table.chains[name] = replace(table.chains[name], rules=())
    elif noun != "chain" and name in table.maps:
        table.maps[name] = replace(table.maps[name], elements={})
    else:
        raise _refused(errno.ENOENT)


def _delete(table: Table, noun: str, name: str) -> None:
    if noun == "chain" and name in table.chains:
        # Its own rules go with it and do not hold it.
        _flush(table, noun, name)
    kind = "map" if noun == "set" else noun
    places: dict[str, Container[str]] = {
        "chain": table.chains,
        "map": table.maps,
        "counter": table.counters,
        "flowtable": table.flowtables,
    }
    if name not in places[kind]:
        raise _refused(errno.ENOENT)
    if (kind, name) in set(table.references()):
        raise _refused(errno.EBUSY)
    if kind == "counter":
        table.counters.remove(name)
    elif kind == "chain":
        del table.chains[name]
    elif kind == "flowtable":
        del table.flowtables[name]
    else:
        del table.maps[name]
