# SPDX-License-Identifier: Apache-2.0
"""Addresses, prefixes and ranges as they are written in a policy."""

from __future__ import annotations

import functools
import ipaddress
import reprlib
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from datapath.plan.ingress import IpNetwork

IpAddress = IPv4Address | IPv6Address

_SHORT = reprlib.Repr()
_SHORT.maxstring = 60


class RefusedError(ValueError):
    """A value that cannot be used, and what to write instead.

    Pydantic turns it into a ``value_error``; the loader gets the hint back from there.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def shown(value: object) -> str:
    """The user's value for a message: escaped, quoted and of bounded length."""
    return str(value).lower() if isinstance(value, bool) else _SHORT.repr(value)


@functools.total_ordering
@dataclass(frozen=True, slots=True)
class VipRange:
    """Service addresses from ``first`` to ``last``, both included, of one family.

    Ordered by family, then by address. An address, a prefix and a range are all of this form.
    """

    first: IpAddress
    last: IpAddress

    @property
    def version(self) -> int:
        """4 or 6."""
        return self.first.version

    @property
    def is_single(self) -> bool:
        """One address only."""
        return self.first == self.last

    @property
    def is_prefix(self) -> bool:
        """Exactly one prefix."""
        first, size = int(self.first), int(self.last) - int(self.first) + 1
        return size & (size - 1) == 0 and first % size == 0

    @property
    def prefix(self) -> IpNetwork | None:
        """The range as a prefix, if it is exactly one."""
        prefixes = self.prefixes()
        return prefixes[0] if len(prefixes) == 1 else None

    def prefixes(self) -> tuple[IpNetwork, ...]:
        """The smallest set of prefixes that covers the range and nothing else, sorted."""
        if self.is_prefix:
            size = int(self.last) - int(self.first) + 1
            # One aligned block: nearly all policies, and far cheaper than the general case.
            length = self.first.max_prefixlen - (size.bit_length() - 1)
            kind_of = ipaddress.IPv4Network if self.version == 4 else ipaddress.IPv6Network
            return (kind_of((int(self.first), length)),)
        if isinstance(self.first, IPv4Address) and isinstance(self.last, IPv4Address):
            return tuple(ipaddress.summarize_address_range(self.first, self.last))
        if isinstance(self.first, IPv6Address) and isinstance(self.last, IPv6Address):
            return tuple(ipaddress.summarize_address_range(self.first, self.last))
        raise AssertionError("a range has one family")

    def __contains__(self, address: IpAddress) -> bool:
        return address.version == self.version and int(self.first) <= int(address) <= int(self.last)

    def __lt__(self, other: VipRange) -> bool:
        return self.sort_key() < other.sort_key()

    def sort_key(self) -> tuple[int, int, int]:
        """Their order, for whoever sorts thousands."""
        return (self.version, int(self.first), int(self.last))

    def overlaps(self, other: VipRange) -> bool:
        """They have an address in common."""
        return (
            self.version == other.version
            and int(self.first) <= int(other.last)
            and int(other.first) <= int(self.last)
        )

    def __str__(self) -> str:
        if self.is_single:
            return str(self.first)
        return str(self.prefix or f"{self.first}-{self.last}")


def prefix_range(prefix: IpNetwork) -> VipRange:
    """All addresses of a prefix."""
    return VipRange(prefix.network_address, prefix.broadcast_address)


def collapse(prefixes: Iterable[IpNetwork]) -> tuple[IpNetwork, ...]:
    """The smallest equal set of prefixes, IPv4 first, sorted by address."""
    v4: list[ipaddress.IPv4Network] = []
    v6: list[ipaddress.IPv6Network] = []
    for prefix in prefixes:
        if isinstance(prefix, ipaddress.IPv4Network):
            v4.append(prefix)
        else:
            v6.append(prefix)
    # One of a kind is what nearly all networks have. To look for its neighbours takes longer than all else that is
    # done about it, and leaves half a kilobyte behind in the prefix itself.
    return (
        *(v4 if len(v4) == 1 else ipaddress.collapse_addresses(v4)),
        *(v6 if len(v6) == 1 else ipaddress.collapse_addresses(v6)),
    )


@functools.cache
def family_set(*versions: int) -> frozenset[int]:
    """The same object for the same families, in ascending order: thousands of networks have one."""
    return frozenset(versions)


def united(ranges: Iterable[VipRange]) -> list[VipRange]:
    """The same addresses as ranges of which no two overlap, sorted; neighbours stay apart."""
    found: list[VipRange] = []
    for item in sorted(ranges, key=VipRange.sort_key):
        if found and found[-1].overlaps(item):
            found[-1] = VipRange(found[-1].first, max(found[-1].last, item.last, key=int))
        else:
            found.append(item)
    return found


def supernets(prefix: IpNetwork, lengths: Iterable[int]) -> Iterator[IpNetwork]:
    """Prefixes of these lengths that hold all of this one, itself included."""
    return (prefix.supernet(new_prefix=length) for length in lengths if length <= prefix.prefixlen)


def parse_address(value: object) -> IpAddress:
    """One address, as text. An address object is passed through.

    Raises:
        RefusedError: anything else.
    """
    if isinstance(value, IPv4Address | IPv6Address):
        return value
    text = _text(value, "an IP address")
    if "/" in text:
        raise RefusedError(
            f"{shown(text)} is a prefix, not an address", "write the address without its prefix length"
        )
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise RefusedError(f"{shown(text)} is not an IP address", _address_hint(text)) from None
    _refuse_scope(address, text)
    return address


def parse_prefix(value: object) -> IpNetwork:
    """A prefix, as text; a single address is a prefix of full length.

    Raises:
        RefusedError: not a prefix, or one with host bits set.
    """
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    text = _text(value, "a prefix")
    length = text.partition("/")[2]
    if "." in length:
        raise RefusedError(f"{shown(text)} has a netmask", "write the prefix length, like 192.0.2.0/24")
    try:
        prefix = ipaddress.ip_network(text)
    except ValueError:
        raise _not_a_prefix(text) from None
    _refuse_scope(prefix.network_address, text)
    return prefix


def parse_vip(value: object) -> VipRange:
    """An address, a prefix or a range ``first-last``.

    Raises:
        RefusedError: none of these; a range that is upside down or mixes the families.
    """
    if isinstance(value, VipRange):
        return value
    text = _text(value, "an address, a prefix or a range")
    if "-" not in text:
        return prefix_range(parse_prefix(text))
    low, _, high = text.partition("-")
    try:
        first, last = parse_address(low.strip()), parse_address(high.strip())
    except RefusedError as refused:
        raise RefusedError(
            f"the range {shown(text)} cannot be read: {refused}",
            "write two full addresses, like 192.0.2.1-192.0.2.9",
        ) from None
    if first.version != last.version:
        raise RefusedError(f"the range {shown(text)} mixes IPv4 and IPv6", "write one range per family")
    if int(first) > int(last):
        raise RefusedError(f"the range {shown(text)} ends before it starts", f"did you mean {last}-{first}?")
    return VipRange(first, last)


def _text(value: object, expected: str) -> str:
    if isinstance(value, str):
        return value
    raise RefusedError(
        f"must be {expected}, not {kind(value)}", "quote it where YAML takes it for something else"
    )


def kind(value: object) -> str:
    """What a value is, in a YAML user's words."""
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else "empty"


def _refuse_scope(address: IpAddress, text: str) -> None:
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        raise RefusedError(
            f"{shown(text)} names a device after the %",
            f"write {str(address).partition('%')[0]}: the device is the network's own",
        )


def _not_a_prefix(text: str) -> RefusedError:
    try:
        loose = ipaddress.ip_network(text, strict=False)
    except ValueError:
        return RefusedError(f"{shown(text)} is not an address or a prefix", _address_hint(text))
    host = text.partition("/")[0]
    return RefusedError(
        f"{shown(text)} has host bits set", f"write {loose} for the prefix, or {host} for the one address"
    )


def _address_hint(text: str) -> str:
    octets = text.partition("/")[0].split(".")
    if len(octets) == 4 and any(len(o) > 1 and o.startswith("0") and o.isdecimal() for o in octets):
        return "write the numbers without leading zeros: some programs read those as octal"
    return "write it like 192.0.2.1, 192.0.2.0/24, 2001:db8::1 or 2001:db8::/64"
