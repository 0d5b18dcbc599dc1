# SPDX-License-Identifier: Apache-2.0
"""Several gateways of one network: which of them are used, and how it is found out that one is not there."""

from __future__ import annotations

import enum
import os
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from datapath.plan.gateways import CheckMethod
from datapath.policy.addresses import RefusedError, shown
from datapath.policy.base import PolicyModel
from datapath.policy.fields import Address, Integer, Text

#: Per family. Shares of those that are down are dealt out among the others in whole numbers (`compiler/gateways.py`).
GATEWAYS_MAX = 8
#: The kernel's own limit is 256, and those shares need the room.
WEIGHT_MAX = 16
#: Of all networks together: 20 µs each, in a daemon that has other things to do.
QUESTIONS_PER_SECOND_MAX = 2000
#: Where FRR puts it without a pathspace (`-N`).
BFD_SOCKET = "/run/frr/bfdd.vty"
#: `sun_path` of linux/un.h, without the terminator.
_SOCKET_BYTES_MAX = 107


class GatewayMode(enum.StrEnum):
    """Which of several gateways are used."""

    ECMP = "ecmp"
    ACTIVE_STANDBY = "active_standby"


class Gateway(PolicyModel):
    """One of several gateways; its address alone will do."""

    address: Address = Field(description="The router's address on this network. IPv6 may be link-local.")
    weight: Integer = Field(
        default=1, ge=1, le=WEIGHT_MAX, description="Its share of the flows, for `gateway_mode: ecmp`."
    )


def _address_alone(value: object) -> object:
    return value if isinstance(value, dict | Gateway) else {"address": value}


GatewayEntry = Annotated[Gateway, BeforeValidator(_address_alone, json_schema_input_type=str | Gateway)]


def _socket_path(path: str) -> str:
    if not path.startswith("/") or not path.isprintable():
        raise RefusedError(
            f"{shown(path)} is not an absolute path",
            f"write it like {BFD_SOCKET}, where FRR's bfdd listens to vtysh",
        )
    if len(os.fsencode(path)) > _SOCKET_BYTES_MAX:
        raise RefusedError(
            f"the path of a socket is {len(os.fsencode(path))} bytes long",
            f"Linux allows {_SOCKET_BYTES_MAX} bytes",
        )
    return path


SocketPath = Annotated[
    Text,
    AfterValidator(_socket_path),
    WithJsonSchema({"type": "string", "pattern": "^/", "maxLength": _SOCKET_BYTES_MAX}),
]


class GatewayCheck(PolicyModel):
    """How the daemon finds out which of a network's `gateways` are there."""

    method: CheckMethod = Field(
        default=CheckMethod.NEIGHBOUR,
        description="`neighbour` (ARP, or neighbour discovery for IPv6), `icmp` (echo; the device needs an address of "
        "its own), `bfd` (sessions of FRR, which must have one with each gateway) or `off`.",
    )
    interval_ms: Integer = Field(
        default=200, ge=10, le=60_000, description="Milliseconds between two questions to one gateway."
    )
    multiplier: Integer = Field(
        default=3, ge=1, le=100, description="So many questions in a row without an answer: it is down."
    )
    recovery: Integer = Field(
        default=5, ge=1, le=1000, description="So many answers in a row, and `hold_s` over: it is up again."
    )
    hold_s: Integer = Field(
        default=5,
        ge=0,
        le=3600,
        description="Seconds for which a gateway stays unused at least; twice as long each time that it goes down soon "
        "after it came up, at most 16 times as long.",
    )
    bfd_socket: SocketPath = Field(
        default=BFD_SOCKET, description="For `method: bfd`: where FRR's bfdd listens to vtysh."
    )


def check_choice(network: Any) -> None:
    """`gateway` and `gateways` are two forms of one thing.

    Raises:
        RefusedError: both are there, or something about several where there is one.
    """
    name = shown(network.name)
    if network.gateway and network.gateways:
        raise RefusedError(f"network {name} has both `gateway` and `gateways`", "keep one of them")
    if network.gateways:
        return
    for key, default in (("gateway_mode", GatewayMode.ECMP), ("gateway_check", GatewayCheck())):
        if getattr(network, key) != default:
            raise RefusedError(
                f"network {name} has `{key}`, but no `gateways`", f"add `gateways`, or remove `{key}`"
            )
