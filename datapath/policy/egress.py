# SPDX-License-Identifier: Apache-2.0
"""`egress:`: connections that pods or the node open themselves, and that leave by one of the networks."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Annotated

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    WithJsonSchema,
    model_validator,
)

from datapath.policy.addresses import RefusedError, VipRange, parse_vip, shown
from datapath.policy.base import PolicyModel
from datapath.policy.fields import Name, Prefix

if TYPE_CHECKING:
    from datapath.policy.addresses import IpAddress
    from datapath.policy.model import Network

#: Each is compared in turn with the first packet of a new connection.
EGRESS_MAX = 256
#: Addresses of one family that the connections of one entry share.
POOL_MAX = 256
_FAMILIES = (4, 6)


class OwnAddress(enum.StrEnum):
    """A source address that is not written down."""

    NETWORK = "network"


def _parse_source(value: object) -> VipRange | OwnAddress:
    if value == OwnAddress.NETWORK:
        return OwnAddress.NETWORK
    try:
        return parse_vip(value)
    except RefusedError as refused:
        if isinstance(value, str) and value.isalpha():
            raise RefusedError(
                f"{shown(value)} is not an address",
                "write `network` for the device's own address, or an address, a prefix or a range",
            ) from None
        raise refused from None


def _one_or_many(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


_SourceIp = Annotated[
    VipRange | OwnAddress,
    PlainValidator(_parse_source),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "description": "`network`, address, prefix, or range first-last"}),
]
_SourceIps = Annotated[
    tuple[_SourceIp, ...],
    BeforeValidator(_one_or_many),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]


class Egress(PolicyModel):
    """Connections that pods or the node open themselves and that leave by one of the networks."""

    name: Name = Field(
        description="Name in counters, logs and `datapath egress`; unique. Lower-case letters, digits and hyphens."
    )
    network: Name = Field(
        description="Name of the network they leave by: one with a gateway, `return_path: conntrack` and "
        "`steering: rules`."
    )
    sources: tuple[Prefix, ...] = Field(
        default=(),
        description="Whose connections: prefixes of pods, or addresses of the node.",
    )
    set: StrictBool = Field(
        default=False,
        description="Also those of the addresses that a program of yours names at run time: "
        "`datapath egress set NAME ADDRESS...`.",
    )
    source_ip: _SourceIps = Field(
        min_length=1,
        description="Source address on the way out: an address for each family (a VIP, for example), or several "
        f"addresses, prefixes or ranges (up to {POOL_MAX} addresses a family), of which each source keeps one, "
        "or `network`: the address of the network's device.",
    )
    destinations: tuple[Prefix, ...] = Field(
        default=(), description="Only connections to these. Default: to everything that is not inside."
    )
    exclude: tuple[Prefix, ...] = Field(
        default=(),
        description="No connections to these: the subnet of the other nodes, for example.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Egress:
        if not self.sources and not self.set:
            raise RefusedError(
                f"egress {shown(self.name)} has no sources",
                "add `sources: [prefix, ...]`, or `set: true` for addresses that come with `datapath egress set`",
            )
        if OwnAddress.NETWORK in self.source_ip and len(self.source_ip) > 1:
            raise RefusedError(
                f"egress {shown(self.name)} has both `network` and addresses in `source_ip`",
                "keep one of them",
            )
        return self

    @property
    def has_own_address(self) -> bool:
        """It takes the address of the network's device."""
        return OwnAddress.NETWORK in self.source_ip

    @property
    def source_ranges(self) -> tuple[VipRange, ...]:
        """The addresses of `source_ip` as they were written; none for `network`."""
        return tuple(item for item in self.source_ip if isinstance(item, VipRange))

    def pool(self, family: int) -> tuple[IpAddress, ...]:
        """The addresses of one family in their order; of a pool that is too large, only the first ones."""
        addresses: dict[IpAddress, None] = {}
        for item in self.source_ranges:
            if item.version == family:
                size = min(int(item.last) - int(item.first) + 1, POOL_MAX + 1)
                addresses |= dict.fromkeys(item.first + offset for offset in range(size))
        return tuple(addresses)

    def families(self, network: Network) -> tuple[int, ...]:
        """In which it can work: somebody may be meant, the network leads out, and there is an address to take."""
        taken = {item.version for item in self.source_ranges}
        meant = _FAMILIES if self.set else {prefix.version for prefix in self.sources}
        return tuple(
            family
            for family in _FAMILIES
            if family in meant
            and network.carries_egress(family)
            and (self.has_own_address or family in taken)
        )
