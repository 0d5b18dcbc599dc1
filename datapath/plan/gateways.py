# SPDX-License-Identifier: Apache-2.0
"""Gateways that the daemon watches, with everything that it must know to ask them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address


class CheckMethod(enum.StrEnum):
    """How a gateway is asked whether it is there."""

    NEIGHBOUR = "neighbour"
    ICMP = "icmp"
    BFD = "bfd"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class GatewayCheck:
    """One gateway to be watched.

    Attributes:
        interval_s: between two questions.
        multiplier: questions in a row without an answer until it is down.
        recovery: answers in a row until it is up again.
        hold_s: for which it stays down at least.
        bfd_socket: of FRR's bfdd, which is asked instead of the gateway; empty for another method.
    """

    network: str
    device: str
    address: IPv4Address | IPv6Address
    method: CheckMethod
    interval_s: float
    multiplier: int
    recovery: int
    hold_s: float
    bfd_socket: str = ""

    @property
    def key(self) -> tuple[str, IPv4Address | IPv6Address]:
        """Names it in one policy."""
        return self.network, self.address

    def render(self) -> str:
        through = f" through {self.bfd_socket}" if self.bfd_socket else ""
        return (
            f"watch gateway {self.address} of {self.network} on {self.device} by {self.method}{through}"
            f" every {self.interval_s:g} s: down after {self.multiplier} without an answer,"
            f" up after {self.recovery} answers and {self.hold_s:g} s"
        )
