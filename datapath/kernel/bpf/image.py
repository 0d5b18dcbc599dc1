# SPDX-License-Identifier: Apache-2.0
"""What the ingress program's maps hold, byte by byte: compared as it is, and decoded only for people.

With 4,094 networks, to read the maps back as addresses takes half a second; as bytes, 50 ms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from datapath.kernel.bpf.encoding import encode_networks, encode_prefixes, slots_of
from datapath.kernel.bpf.source import Capacities
from datapath.kernel.bpf.tables import IngressTables, PrefixTable, resolve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datapath.kernel.bpf.encoding import Elements
    from datapath.plan.ingress import IngressProgram

#: One of the tries: a question, and an IP version.
Trie = tuple[PrefixTable, int]
TRIES: tuple[Trie, ...] = tuple((table, version) for table in PrefixTable for version in (4, 6))


def _no_prefixes() -> dict[Trie, Elements]:
    return {trie: {} for trie in TRIES}


@dataclass(frozen=True, slots=True)
class Image:
    """Elements of all maps that user space fills; equal images are equal behaviour."""

    networks: Elements = field(default_factory=dict)
    prefixes: Mapping[Trie, Elements] = field(default_factory=_no_prefixes)

    @classmethod
    def of(cls, tables: IngressTables) -> Image:
        encoded = {table: encode_prefixes(tables.prefixes[table]) for table in PrefixTable}
        return cls(
            encode_networks(tables.networks),
            {(table, version): encoded[table][version] for table, version in TRIES},
        )

    @property
    def slots(self) -> frozenset[int]:
        """The slots in use."""
        return slots_of(self.networks)

    @property
    def need(self) -> Capacities:
        """The smallest maps that hold this."""
        return Capacities.for_need(networks=len(self.networks), highest_slot=max(self.slots, default=0))


class _Last:
    """The image that was asked for last: one apply asks for the same one up to six times."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._desired: IngressProgram | None = None
        self._ifindexes: dict[str, int | None] = {}
        self._image = Image()

    def image(self, desired: IngressProgram, ifindexes: Mapping[str, int]) -> Image:
        is_known = desired is self._desired and all(
            ifindexes.get(name) == index for name, index in self._ifindexes.items()
        )
        if not is_known:
            self._image = Image.of(resolve(desired, ifindexes))
            names = {name for network in desired.networks for name in (network.point.ifname, network.device)}
            self._desired, self._ifindexes = desired, {name: ifindexes.get(name) for name in names}
        return self._image


_last = _Last()


def forget_image() -> None:
    """Free what is kept between two questions."""
    _last.forget()


def image_of(desired: IngressProgram, ifindexes: Mapping[str, int]) -> Image:
    """What the maps of a desired program must hold on this node.

    Raises:
        KernelError, ValueError: as `resolve`.
    """
    return _last.image(desired, ifindexes)
