# SPDX-License-Identifier: Apache-2.0
"""What is to be tried after a change, with everything that the kernel must be told about it."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address


class ProbeKind(enum.StrEnum):
    """What is tried."""

    GATEWAY = "gateway"
    TCP = "tcp"
    HTTP = "http"


@dataclass(frozen=True, slots=True)
class ProbeTask:
    """One thing to try.

    Attributes:
        name: as messages call it; unique in a policy, and the same before and after a change.
        position: index of its entry in the policy's `probes`.
        port: for TCP and HTTP.
        host: for HTTP, as the Host header says it; `path` goes with it.
        network: that it is about or goes by; empty for the node's own routes.
        device: of that network.
        fwmark: that sends a packet to that network's table; 0 where it has none.
        timeout_s: of one attempt.
    """

    name: str
    position: int
    kind: ProbeKind
    address: IPv4Address | IPv6Address
    port: int = 0
    host: str = ""
    path: str = ""
    network: str = ""
    device: str = ""
    fwmark: int = 0
    timeout_s: int = 1
    attempts: int = 1
