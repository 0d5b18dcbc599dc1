# SPDX-License-Identifier: Apache-2.0
"""nftables nouns, and how each of them is written as text.

nft does not list a rule back as it was given (`& 0xffff00ff | 0x100` returns as `& 0xffff01ff | 0x100`),
so every rule carries a digest of its own text in its comment. That is what makes a table comparable
with the desired one after the process that wrote it is gone.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

#: Longest comment that the kernel and nft accept (NFTNL_UDATA_COMMENT_MAXLEN, 128 with the final NUL).
COMMENT_MAX = 127
#: All bits of a mark.
FULL = 0xFFFFFFFF
#: Our table. What is in it is ours; nothing else is.
TABLE_FAMILY = "inet"
TABLE_NAME = "datapath"
#: The base chain that stands for the tc program where nftables does its work.
CLASSIFY_CHAIN = "classify"
#: A chain that nothing enters and a set that nothing looks up: a restarted process finds the ids there.
IDS = "ids"
#: The chain that sets connection-tracking zones, and the map that says which.
ZONES = "zones"
_COMMENT_TEXT = re.compile(r"[A-Za-z0-9 _.,:;=/()\[\]<>+*-]*\Z")
_DIGEST_MARK = " #"
_DIGEST_LENGTH = 8


class ChainType(enum.StrEnum):
    """`type` of a base chain. Only `ROUTE` looks the route up again when a mark changes."""

    FILTER = "filter"
    ROUTE = "route"
    NAT = "nat"


class Hook(enum.StrEnum):
    """Netfilter hooks of the inet family that we use."""

    PREROUTING = "prerouting"
    INPUT = "input"
    FORWARD = "forward"
    OUTPUT = "output"
    POSTROUTING = "postrouting"


@dataclass(frozen=True, slots=True)
class BaseChain:
    """Where and when a chain is entered."""

    type: ChainType
    hook: Hook
    priority: int

    def render(self) -> str:
        return f"type {self.type} hook {self.hook} priority {self.priority}; policy accept;"


@dataclass(frozen=True, slots=True)
class NftRule:
    """One rule: nft statements, and the policy element that it comes from."""

    text: str
    origin: str

    def __post_init__(self) -> None:
        if not _COMMENT_TEXT.match(self.origin):
            raise ValueError(f"not allowed in an nft comment: {self.origin!r}")

    @property
    def digest(self) -> str:
        """Identity of the rule's text and origin, short enough for a comment."""
        whole = f"{self.text}\0{self.origin}".encode()
        return hashlib.sha256(whole).hexdigest()[:_DIGEST_LENGTH]

    @property
    def comment(self) -> str:
        room = COMMENT_MAX - len(_DIGEST_MARK) - _DIGEST_LENGTH
        return f"{self.origin[:room]}{_DIGEST_MARK}{self.digest}"

    def render(self) -> str:
        return f'{self.text} comment "{self.comment}"'


def digest_in_comment(comment: str | None) -> str | None:
    """The digest that `NftRule.comment` put there; None for a rule that is not ours."""
    if comment is None or _DIGEST_MARK not in comment:
        return None
    return comment.rsplit(_DIGEST_MARK, 1)[1]


@dataclass(frozen=True, slots=True)
class NftChain:
    """A chain and its rules in order; `base` is None for one that is only jumped to."""

    name: str
    rules: tuple[NftRule, ...]
    base: BaseChain | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(rule.digest for rule in self.rules)


@dataclass(frozen=True, slots=True)
class NftMap:
    """A verdict map or a set.

    Attributes:
        key_type: nft type of the key, as in `type mark : verdict`.
        value_type: `verdict`, or an empty string for a set.
        elements: sorted pairs of key text and value text, both as nft lists them. The value of a set's element
            is its comment, or empty.
        flags: for example `interval`, sorted.
        typeof: how it is declared where types have no name: expressions, as in `iifname : ct zone`. The types are then
            as nft lists them.
    """

    name: str
    key_type: str
    value_type: str
    elements: tuple[tuple[str, str], ...]
    flags: tuple[str, ...] = ()
    typeof: str = ""

    @property
    def noun(self) -> str:
        """What nft calls this object in a command."""
        return "map" if self.value_type else "set"

    def render_type(self) -> str:
        kind = f"type {self.key_type} : {self.value_type};" if self.value_type else f"type {self.key_type};"
        kind = f"typeof {self.typeof};" if self.typeof else kind
        return f"{kind} flags {', '.join(self.flags)};" if self.flags else kind

    def render_element(self, key: str, value: str) -> str:
        """One element as it stands between the braces of `add element`."""
        if not value:
            return key
        return f"{key} : {value}" if self.value_type else f'{key} comment "{value}"'


@dataclass(frozen=True, slots=True)
class NftFlowtable:
    """What carries established flows past the hooks, from the ingress of its devices.

    Attributes:
        devices: sorted names. All of them where the plan is made; where it is carried out, those that are there: the
            kernel refuses a flowtable with a device that it does not know, and forgets those that go.
    """

    name: str
    devices: tuple[str, ...]

    def render(self, devices: tuple[str, ...]) -> str:
        """Its body with some of its devices. `counter` keeps the accounting of conntrack true."""
        named = ", ".join(f'"{device}"' for device in devices)
        return f"hook ingress priority 0; counter;{f' devices = {{ {named} }};' if named else ''}"


@dataclass(frozen=True, slots=True)
class NftTable:
    """Our whole table; chains, maps, counters and flowtables are sorted by name."""

    family: str
    name: str
    chains: tuple[NftChain, ...] = ()
    maps: tuple[NftMap, ...] = ()
    counters: tuple[str, ...] = ()
    flowtables: tuple[NftFlowtable, ...] = ()

    @property
    def spec(self) -> str:
        return f"{self.family} {self.name}"

    def also(self, chains: Iterable[NftChain], maps: Iterable[NftMap]) -> NftTable:
        """The table with these as well."""
        return dataclasses.replace(
            self,
            chains=tuple(sorted((*self.chains, *chains), key=lambda chain: chain.name)),
            maps=tuple(sorted((*self.maps, *maps), key=lambda item: item.name)),
        )
