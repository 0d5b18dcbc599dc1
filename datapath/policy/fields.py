# SPDX-License-Identifier: Apache-2.0
"""The types of single fields: how a value is read, refused and described to editors."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    PlainSerializer,
    PlainValidator,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)

from datapath.plan.ingress import IpNetwork, VlanProtocol
from datapath.policy.addresses import (
    IpAddress,
    RefusedError,
    VipRange,
    kind,
    parse_address,
    parse_prefix,
    parse_vip,
    shown,
)
from datapath.policy.marks import MARK_MAX, MASK_BITS_MAX

#: IFNAMSIZ - 1 (`linux/if.h`): the kernel's names are 16 bytes with the terminator.
IFNAME_BYTES_MAX = 15

#: Local, main and default, and what netlink reads as "no table".
RESERVED_TABLES = {0: "unspecified", 253: "default", 254: "main", 255: "local"}

TABLE_MAX = 0xFFFF_FFFF

#: Connection-tracking zones are 16 bits wide.
ZONE_MAX = 0xFFFF

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,30}[a-z0-9])?")
_IFNAME_REFUSED = re.compile(r"[^\x21-\x7e]|[/:\"*$@{}#;\\]")


def check_name(name: str) -> str:
    """A network's name: it appears in nft comments, metrics and logs, so it is kept plain."""
    if _NAME.fullmatch(name):
        return name
    raise RefusedError(
        f"{shown(name)} is not a usable name",
        "use 1 to 32 lower-case letters, digits and hyphens; begin with a letter, end without a hyphen",
    )


def check_ifname(name: str) -> str:
    """A device name that the kernel accepts and that nft and tc read as a plain word."""
    if name in {"", ".", ".."}:
        raise RefusedError(f"{shown(name)} is not a device name", "write the name that `ip link` shows")
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > IFNAME_BYTES_MAX:
        raise RefusedError(
            f"the device name {shown(name)} is {size} bytes long",
            f"the kernel allows {IFNAME_BYTES_MAX} bytes",
        )
    refused = _IFNAME_REFUSED.search(name)
    if refused:
        raise RefusedError(
            f"the device name {shown(name)} has the character {shown(refused.group())}",
            "use letters, digits and . _ - only: the kernel or nft reads other characters differently",
        )
    return name


def check_mask(mask: int) -> int:
    """A fwmark mask: some bits of 32, not too many."""
    if not 0 < mask <= MARK_MAX:
        raise RefusedError(f"the mask {mask:#x} is not a non-zero 32-bit number", "write it like 0x0fff0000")
    if mask.bit_count() > MASK_BITS_MAX:
        raise RefusedError(
            f"the mask {mask:#x} has {mask.bit_count()} bits",
            f"use at most {MASK_BITS_MAX} bits: the others belong to other agents on the node",
        )
    return mask


def check_mark(mark: int) -> int:
    """A fwmark of one network; that it lies inside the mask is checked with the rest of the file."""
    if not 0 < mark <= MARK_MAX:
        raise RefusedError(f"the mark {mark:#x} is not a non-zero 32-bit number", "zero means: not marked")
    return mark


def check_table(table: int) -> int:
    """A routing table that may be ours."""
    if table in RESERVED_TABLES:
        raise RefusedError(
            f"table {table} is the kernel's own ({RESERVED_TABLES[table]})",
            "leave `table` out: one is chosen",
        )
    if not 0 < table <= TABLE_MAX:
        raise RefusedError(f"table {table} is out of range", f"use 1 to {TABLE_MAX}, or leave `table` out")
    return table


def check_zone(zone: int) -> int:
    """A connection-tracking zone that may be a network's own."""
    if 0 < zone <= ZONE_MAX:
        return zone
    raise RefusedError(
        f"zone {zone} is out of range" if zone else "zone 0 is everybody's",
        f"use 1 to {ZONE_MAX}, or leave `zone` out: one is chosen",
    )


def check_port(port: int) -> int:
    """A TCP or UDP port."""
    if 1 <= port <= 65535:
        return port
    raise RefusedError(f"port {port} is out of range", "use 1 to 65535")


_PROTOCOLS = {"802.1Q": VlanProtocol.DOT1Q, "802.1ad": VlanProtocol.DOT1AD}


def _parse_protocol(value: object) -> VlanProtocol:
    if isinstance(value, VlanProtocol) and value is not VlanProtocol.UNTAGGED:
        return value
    if isinstance(value, str) and value in _PROTOCOLS:
        return _PROTOCOLS[value]
    raise RefusedError(f"{shown(value)} is not a VLAN protocol", "write 802.1Q or 802.1ad")


def _show_protocol(protocol: VlanProtocol) -> str:
    return "802.1ad" if protocol is VlanProtocol.DOT1AD else "802.1Q"


def _one_or_many(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _integer(value: object) -> object:
    if isinstance(value, str) and re.fullmatch(r"[-+]?(0x[0-9a-fA-F]+|[0-9]+)", value):
        raise RefusedError(f"{shown(value)} is text, not a number", "write it without quotes")
    return value


def _text(value: object) -> object:
    if not isinstance(value, str):
        raise RefusedError(f"must be text, not {kind(value)}", "put it in quotes")
    return value


def _schema(description: str, **extra: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "description": description, **extra})


Integer = Annotated[StrictInt, BeforeValidator(_integer)]
Text = Annotated[StrictStr, BeforeValidator(_text)]

Name = Annotated[
    Text,
    AfterValidator(check_name),
    WithJsonSchema({"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,30}[a-z0-9])?$"}),
]
InterfaceName = Annotated[
    Text,
    AfterValidator(check_ifname),
    WithJsonSchema({"type": "string", "pattern": r"^[^\s/:\"*$@{}#;\\]{1,15}$"}),
]
Mask = Annotated[
    Integer,
    AfterValidator(check_mask),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MARK_MAX}),
]
Mark = Annotated[
    Integer,
    AfterValidator(check_mark),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": MARK_MAX}),
]
Table = Annotated[
    Integer,
    AfterValidator(check_table),
    WithJsonSchema(
        {"type": "integer", "minimum": 1, "maximum": TABLE_MAX, "not": {"enum": sorted(RESERVED_TABLES)[1:]}}
    ),
]
Zone = Annotated[
    Integer,
    AfterValidator(check_zone),
    WithJsonSchema({"type": "integer", "minimum": 1, "maximum": ZONE_MAX}),
]
Address = Annotated[
    IpAddress, PlainValidator(parse_address), PlainSerializer(str), _schema("IPv4 or IPv6 address")
]
Prefix = Annotated[
    IpNetwork,
    PlainValidator(parse_prefix),
    PlainSerializer(str),
    _schema("IPv4 or IPv6 prefix without host bits"),
]
Vip = Annotated[
    VipRange, PlainValidator(parse_vip), PlainSerializer(str), _schema("address, prefix, or range first-last")
]
Addresses = Annotated[
    tuple[Address, ...],
    BeforeValidator(_one_or_many),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "maxItems": 2},
            ]
        }
    ),
]
Tpid = Annotated[
    VlanProtocol,
    PlainValidator(_parse_protocol),
    PlainSerializer(_show_protocol),
    WithJsonSchema({"type": "string", "enum": ["802.1Q", "802.1ad"]}),
]
