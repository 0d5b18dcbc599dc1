# SPDX-License-Identifier: Apache-2.0
"""`vrf` of a network."""

from __future__ import annotations

from pydantic import Field, StrictBool

from datapath.policy.base import PolicyModel
from datapath.policy.fields import InterfaceName, Prefix, Table


class Vrf(PolicyModel):
    """The VRF that the network's device belongs to. Several networks may share one."""

    name: InterfaceName = Field(description="Name of the VRF device.")
    table: Table = Field(description="Routing table of the VRF.")
    create: StrictBool = Field(default=False, description="Make the VRF device if it does not exist.")
    leak: tuple[Prefix, ...] = Field(
        default=(),
        description="Prefixes of the main table that the VRF's clients may reach, besides `node.internal`: for example "
        "those of other nodes whose host network serves.",
    )
    host_sockets: StrictBool = Field(
        default=True,
        description="Let the node's own sockets answer: sets `tcp_l3mdev_accept` and `udp_l3mdev_accept`, which count "
        "for every VRF of the node.",
    )
