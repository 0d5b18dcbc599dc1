# SPDX-License-Identifier: Apache-2.0
"""The index over the tries of the egress program: where its look-ups can be spared (bpf/steering_index.h).

Of each IP version the VIPs of the most frequent prefix length lie in an array, by a hash of their address. What the
array cannot hold (a second VIP in a bucket, one with others inside) marks its bucket, and the trie is asked there. VIPs
with shorter prefixes make the trie be asked always. Destinations are first compared with a few prefixes that cover
whatever is never steered.
"""

from __future__ import annotations

import ctypes
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from datapath.kernel.bpf import abi

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from datapath.kernel.bpf.encoding import Elements
    from datapath.kernel.bpf.tables import SlotPrefix

_BYTE_ORDER: Final = sys.byteorder
_WORD: Final = (1 << 64) - 1
#: Odd, so that nothing is lost; the first one without collisions is taken.
_MULTIPLIERS: Final = tuple(pow(0x9E3779B97F4A7C15, power, 1 << 64) for power in range(1, 17))
_LENGTH_BYTES: Final = 4
_ADDRESS_BYTES: Final = {4: 4, 6: 16}
#: How much of an address `passed4` and `passed6` compare.
_COMPARED_BYTES: Final = {4: 4, 6: 8}


@dataclass(frozen=True, slots=True)
class Index:
    """Contents of the maps of the index.

    Attributes:
        how: the only element of `dp_index`.
        buckets: of `dp_index4` and `dp_index6`, by IP version, those that are not empty.
    """

    how: bytes
    buckets: Mapping[int, Elements]

    @property
    def stopped(self) -> bytes:
        """`how`, but the tries are asked."""
        how = abi.SteeringIndex.from_buffer_copy(self.how)
        how.state4 = how.state6 = abi.IndexState.OFF
        return bytes(how)


@dataclass(frozen=True, slots=True)
class _Family:
    """Of one IP version; the mask as it lies in an address."""

    mask: bytes
    multiplier: int
    state: abi.IndexState
    buckets: Elements


def build(replies: Mapping[int, Elements], targets: Iterable[SlotPrefix], sizes: Mapping[int, int]) -> Index:
    """The index over these tables.

    Args:
        replies: elements of the tries of VIPs, by IP version.
        targets: those of slot 0 are what is never steered.
        sizes: how many buckets there are, by IP version; powers of two.
    """
    families = {version: _family(version, replies[version], sizes[version]) for version in (4, 6)}
    array4, array6 = ctypes.c_uint8 * 4, ctypes.c_uint8 * 16
    passed = sorted((prefix for slot, prefix in targets if slot == abi.SLOT_NONE), key=str)
    how = abi.SteeringIndex(
        multiplier4=families[4].multiplier,
        multiplier6=families[6].multiplier,
        mask4=array4(*families[4].mask),
        mask6=array6(*families[6].mask),
        state4=families[4].state,
        state6=families[6].state,
    )
    for version, slots in ((4, how.passed4), (6, how.passed6)):
        array = ctypes.c_uint8 * _COMPARED_BYTES[version]
        pairs = [
            (prefix.network_address.packed, prefix.netmask.packed)
            for prefix in passed
            if prefix.version == version
        ]
        for slot, (address, mask) in zip(slots, _covering(pairs, _COMPARED_BYTES[version]), strict=True):
            slot.address, slot.mask = array(*address), array(*mask)
    return Index(bytes(how), {version: family.buckets for version, family in families.items()})


def _covering(pairs: Sequence[tuple[bytes, bytes]], size: int) -> list[tuple[bytes, bytes]]:
    """Prefixes that cover all of these, by as many bytes as are compared; too many are covered by all addresses."""
    cut = sorted({(address[:size], mask[:size]) for address, mask in pairs})
    if len(cut) > abi.PASSED_FIRST:
        cut = [(bytes(size), bytes(size))]
    none = (b"\xff" * size, bytes(size))
    return cut + [none] * (abi.PASSED_FIRST - len(cut))


def _family(version: int, replies: Elements, size: int) -> _Family:
    width = _ADDRESS_BYTES[version]
    prefixes = sorted(
        (int.from_bytes(key[:_LENGTH_BYTES], _BYTE_ORDER), key[_LENGTH_BYTES:], value)
        for key, value in replies.items()
    )
    counts = Counter(length for length, _, _ in prefixes)
    chosen = max(counts, key=lambda length: (counts[length], -length), default=0)
    mask = ((1 << chosen) - 1) << (8 * width - chosen)
    longer = {
        (int.from_bytes(address, "big") & mask).to_bytes(width, "big")
        for length, address, _ in prefixes
        if length > chosen
    }
    # The longest prefix decides, so one that has others inside is left to the trie.
    indexed = {
        address: value for length, address, value in prefixes if length == chosen and address not in longer
    }
    multiplier = _best_multiplier([*indexed, *sorted(longer)], size)
    crowded = set(_buckets(sorted(longer), multiplier, size))
    first: dict[int, bytes] = {}
    for bucket, address in zip(_buckets(tuple(indexed), multiplier, size), indexed, strict=True):
        if first.setdefault(bucket, address) != address:
            crowded.add(bucket)
    layout = abi.IndexedNetwork4 if version == 4 else abi.IndexedNetwork6
    elements = {}
    for bucket in sorted(crowded | set(first)):
        element = layout(ask_trie=bucket in crowded)
        if bucket in first:
            address = first[bucket]
            element.address[:] = address
            element.network = type(element.network).from_buffer_copy(indexed[address])
        elements[bucket.to_bytes(4, _BYTE_ORDER)] = bytes(element)
    state = abi.IndexState.PART if any(length < chosen for length in counts) else abi.IndexState.WHOLE
    return _Family(mask.to_bytes(width, "big"), multiplier, state, elements)


def _best_multiplier(addresses: Sequence[bytes], size: int) -> int:
    """The first one without collisions, or that with the fewest; networks are often numbered one by one."""
    best, fewest = _MULTIPLIERS[0], len(addresses)
    for multiplier in _MULTIPLIERS:
        collisions = len(addresses) - len(set(_buckets(addresses, multiplier, size)))
        if collisions == 0:
            return multiplier
        if collisions < fewest:
            best, fewest = multiplier, collisions
    return best


def _buckets(addresses: Sequence[bytes], multiplier: int, size: int) -> list[int]:
    """The hash of bpf/steering_index.h."""
    shift = 65 - size.bit_length()
    if addresses and len(addresses[0]) == _ADDRESS_BYTES[4]:
        words = (int.from_bytes(address, _BYTE_ORDER) * multiplier for address in addresses)
    else:
        words = (
            (
                (int.from_bytes(address[:8], _BYTE_ORDER) * multiplier & _WORD)
                ^ int.from_bytes(address[8:], _BYTE_ORDER)
            )
            * multiplier
            for address in addresses
        )
    return [(word & _WORD) >> shift for word in words]
