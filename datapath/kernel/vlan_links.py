# SPDX-License-Identifier: Apache-2.0
"""Making, moving and removing VLAN and VRF devices, through pyroute2.

That is rare, so only who does it pays for loading the library.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from datapath.kernel.rtnl import ifindex, refusal
from datapath.plan.rtnl import Slave, VlanLink, VrfLink


class VlanLinks:
    """One pyroute2 socket of the current network namespace; to be closed."""

    def __init__(self) -> None:
        self._ipr = IPRoute()

    def close(self) -> None:
        self._ipr.close()

    def add(self, link: VlanLink | VrfLink) -> None:
        if isinstance(link, VrfLink):
            with _refusals("add VRF", link.render()):
                self._ipr.link("add", ifname=link.name, kind="vrf", vrf_table=link.table)
                self._ipr.link("set", index=ifindex(link.name), state="up")
            return
        with _refusals("add VLAN device", link.render()):
            self._ipr.link(
                "add",
                ifname=link.name,
                kind="vlan",
                link=ifindex(link.parent),
                vlan_id=link.vlan_id,
                vlan_protocol=int(link.protocol),
            )
            self._ipr.link("set", index=ifindex(link.name), state="up")

    def enslave(self, slave: Slave) -> None:
        with _refusals("set link master", slave.render()):
            self._ipr.link("set", index=ifindex(slave.device), master=ifindex(slave.vrf))

    def release(self, device: str) -> None:
        with _refusals("set link nomaster", device):
            self._ipr.link("set", index=ifindex(device), master=0)

    def set_up(self, name: str) -> None:
        with _refusals("set link up", name):
            self._ipr.link("set", index=ifindex(name), state="up")

    def delete(self, name: str) -> None:
        with _refusals("delete link", name):
            self._ipr.link("del", index=ifindex(name))


@contextmanager
def _refusals(operation: str, what: str) -> Iterator[None]:
    """Turn the kernel's refusal into words."""
    try:
        yield
    except NetlinkError as error:
        raise refusal(operation, what, error.code, str(error.args[1])) from error
