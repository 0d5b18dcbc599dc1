# SPDX-License-Identifier: Apache-2.0
"""`vlan` of a network."""

from __future__ import annotations

from pydantic import Field, model_validator

from datapath.plan.ingress import VlanProtocol
from datapath.policy.addresses import RefusedError, shown
from datapath.policy.base import PolicyModel
from datapath.policy.fields import IFNAME_BYTES_MAX, Integer, InterfaceName, Tpid


def _default_vlan_name(data: object) -> object:
    if not isinstance(data, dict) or "name" in data:
        return data
    parent, vlan_id = data.get("parent"), data.get("id")
    if not isinstance(parent, str) or type(vlan_id) is not int:
        return data
    name = f"{parent}.{vlan_id}"
    if (
        len(parent.encode("utf-8", "surrogatepass"))
        <= IFNAME_BYTES_MAX
        < len(name.encode("utf-8", "surrogatepass"))
    ):
        raise RefusedError(
            f"the device name {shown(name)} would exceed the {IFNAME_BYTES_MAX} bytes of the kernel",
            "set `name` to a shorter one",
        )
    return {**data, "name": name}


class VlanDevice(PolicyModel):
    """A VLAN device on a trunk; made if it does not exist."""

    parent: InterfaceName = Field(description="The trunk: the device that carries the tagged frames.")
    id: Integer = Field(ge=1, le=4094, description="VLAN id.")
    # Never "" once validated: the validator below fills it in.
    name: InterfaceName = Field(default="", description="Name of the device. Default: `{parent}.{id}`.")
    protocol: Tpid = Field(
        default=VlanProtocol.DOT1Q,
        description="`802.1Q`, or `802.1ad` for the outer tag of a provider network.",
    )

    _name = model_validator(mode="before")(_default_vlan_name)
