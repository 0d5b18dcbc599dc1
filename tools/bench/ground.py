# SPDX-License-Identifier: Apache-2.0
"""Where it is measured: one namespace per node, and one for all that is around them.

    far: client<k> -- eth0.<N> [node k] pod0 -- pod<k>
                               [node k] mgmt0 -- mgmt<k>      (the default route of a node with a policy)

Plain veths with static neighbours. Only the last of N networks is used; the devices of the others are macvlans, which
cost little to make and delete. All of it is deleted in the end whatever happens, and at exit by the names' process id.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.bench import plan
from tools.bench.programs import Programs
from tools.lab.netns import Namespace, leftovers, new_prefix, remove
from tools.lab.topology import FAMILIES, Network, Pair

#: Devices of unused networks: one command deletes them all, much faster than the namespace would.
_GROUP: Final = 4242
_TRUNK: Final = "trunk0"
_IDLE: Final = "idle0"
_OTHER_NODE_MAC: Final = 0x02_00_00_00_01_00
_NODE_MAC: Final = 0x02_00_00_00_02_00
#: Flows live longer than a run, however many variants take their turn.
_CONNTRACK_TIMEOUT_S: Final = 3600


@dataclass(frozen=True, slots=True)
class Link:
    """A device of the node and its far end.

    Attributes:
        near, far: names; the far one is in the namespace around.
        ifindex: of the near one.
        near_mac, far_mac: their addresses.
    """

    near: str
    far: str
    ifindex: int
    near_mac: bytes
    far_mac: bytes

    @property
    def ether(self) -> tuple[bytes, bytes]:
        """Receiver and sender of a frame into the node."""
        return self.near_mac, self.far_mac


@dataclass(frozen=True, slots=True)
class Ground:
    """One node and its surroundings.

    Attributes:
        networks: their numbers; the last one is measured.
        vlan, pod, default: its three connections.
        files: a directory of its own, for the policy and the product's state.
    """

    node: Namespace
    around: Namespace
    networks: range
    vlan: Link
    pod: Link
    default: Link
    files: Path

    @property
    def network(self) -> Network:
        """The measured network."""
        return plan.network(self.networks[-1])

    def link(self, role: str) -> Link:
        """`vlan` or `default`."""
        return self.vlan if role == "vlan" else self.default


def mac_text(mac: bytes) -> str:
    """With colons."""
    return mac.hex(":")


class Site:
    """Makes grounds, and removes all of them."""

    def __init__(self, programs: Programs) -> None:
        self._programs = programs
        self._prefix = new_prefix()
        self._names: list[str] = []
        self._crowded: list[Namespace] = []
        self._files = tempfile.TemporaryDirectory(prefix="datapath-bench-")
        self.around = self.namespace("far")
        self._keep_dispatched()

    def namespace(self, role: str) -> Namespace:
        """One more namespace, quiet by itself."""
        namespace = Namespace(f"{self._prefix}{role}{len(self._names)}")
        self._names.append(namespace.name)
        namespace.create()
        # No link-local addresses, no listener reports: nothing moves but what is measured.
        keys = ("all", "default")
        namespace.sysctl({f"net/ipv6/conf/{key}/addr_gen_mode": 1 for key in keys})
        return namespace

    def _keep_dispatched(self) -> None:
        """Attach the generator to a device of no use.

        The kernel has a jump table of the XDP programs in use. A test run of one that is not attached anywhere changes
        it twice, and waits for all CPUs to notice: 20 ms on a quiet machine, far more than the run itself.
        """
        self.around.ip([f"link add {_IDLE} type veth peer name {_IDLE}far", f"link set {_IDLE} up"])
        self.around.call(lambda: self._programs.attach_xdp("generate", socket.if_nametoindex(_IDLE)))

    def close(self) -> None:
        """Delete every namespace, the crowded ones quickly."""
        for namespace in self._crowded:
            subprocess.run(
                ["ip", "-n", namespace.name, "link", "del", "group", str(_GROUP)],
                check=False,
                capture_output=True,
            )
        for name in self._names:
            remove(name)
        self._files.cleanup()

    def directory(self, name: str) -> Path:
        """A directory that is removed in the end."""
        path = Path(self._files.name, name)
        path.mkdir()
        return path

    def ground(self, count: int, *, all_devices: bool) -> Ground:
        """A node with `count` networks.

        Args:
            count: the number of networks; the last one is measured.
            all_devices: make the devices of the others, too.
        """
        index = len(self._names)
        node = self.namespace("node")
        measured = plan.network(count)
        vlan, pod, default = (
            self._link(node, index, role, near)
            for role, near in enumerate((measured.device, plan.POD_DEVICE, plan.DEFAULT_DEVICE))
        )
        files = self.directory(node.name)
        built = Ground(node, self.around, range(1, count + 1), vlan, pod, default, files)
        if all_devices and count > 1:
            self._crowd(node, count)
        _route(built)
        self._attach(built)
        return built

    def without_xdp(self, built: Ground) -> None:
        """Nothing but sockets will send: with XDP a veth does no segmentation offload."""

        def at_the_node() -> None:
            for link in (built.vlan, built.default):
                self._programs.detach_xdp(link.ifindex)

        built.node.call(at_the_node)

    def _link(self, node: Namespace, index: int, role: int, near: str) -> Link:
        far = f"{('client', 'pod', 'mgmt')[role]}{index}"
        near_mac = (_NODE_MAC + role).to_bytes(6, "big")
        far_mac = (_OTHER_NODE_MAC + role).to_bytes(6, "big")
        peer = f"peer name {near} netns {node.name} address {mac_text(near_mac)}"
        self.around.ip(
            [
                f"link add {far} address {mac_text(far_mac)} type veth {peer}",
                f"link set {far} up",
            ]
        )
        node.ip([f"link set {near} up"])
        return Link(near, far, node.call(lambda: socket.if_nametoindex(near)), near_mac, far_mac)

    def _crowd(self, node: Namespace, count: int) -> None:
        self._crowded.append(node)
        node.ip([f"link add {_TRUNK} type veth peer name {_TRUNK}far", f"link set {_TRUNK} up"])
        node.ip(
            f"link add link {_TRUNK} name {plan.network(number).device} group {_GROUP} up type macvlan mode private"
            for number in range(1, count)
        )

    def _attach(self, built: Ground) -> None:
        def at_the_node() -> None:
            for link in (built.vlan, built.default):
                self._programs.attach_xdp("accept", link.ifindex)

        def around() -> None:
            for link, name in (
                (built.vlan, "client"),
                (built.pod, "pod"),
                (built.default, "default_gateway"),
            ):
                self._programs.attach_tc(name, socket.if_nametoindex(link.far))

        built.node.call(at_the_node)
        built.around.call(around)


@contextlib.contextmanager
def site(programs: Programs) -> Iterator[Site]:
    """A site that leaves nothing behind; what a killed run left is removed first."""
    for name in leftovers():
        remove(name)
    made = Site(programs)
    try:
        yield made
    finally:
        made.close()


def _route(built: Ground) -> None:
    """What every variant has in common: addresses, neighbours, and the routes of the main table but the default."""
    node, network = built.node, built.network
    node.sysctl({"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1})
    lines = []
    for family in FAMILIES:
        bits = {4: (24, 16, 29, 32), 6: (64, 64, 125, 128)}[family]
        option = f"-{family} "
        nodad = " nodad" if family == 6 else ""

        def add(
            what: str, prefix: Pair | None = None, length: int = 0, option: str = option, family: int = family
        ) -> None:
            text = f"{prefix.get(family)}/{length} " if prefix else ""
            lines.append(f"{option}{what.replace('@', text)}")

        gateway = network.gateway.get(family)
        default_gateway = plan.DEFAULT_GATEWAY.get(family)
        pod = plan.POD.get(family)
        add(f"addr add @dev {built.pod.near}{nodad}", plan.POD_SIDE, bits[0])
        add(f"addr add @dev {built.default.near}{nodad}", plan.NODE, bits[0])
        add(f"neigh add {gateway} lladdr {mac_text(built.vlan.far_mac)} dev {built.vlan.near}")
        add(f"neigh add {pod} lladdr {mac_text(built.pod.far_mac)} dev {built.pod.near}")
        add(f"neigh add {default_gateway} lladdr {mac_text(built.default.far_mac)} dev {built.default.near}")
        add(f"route add @via {pod} dev {built.pod.near}", plan.vip(network, plan.POD_VIPS), bits[2])
        add(f"route add @via {pod} dev {built.pod.near}", plan.OTHER_PODS, bits[0])
        add(f"route add @via {default_gateway} dev {built.default.near}", plan.FOREIGN, bits[0])
        add(f"route add @via {gateway} dev {built.vlan.near} onlink", plan.ROUTED, bits[1])
        for offset in range(plan.VIPS):
            add(f"addr add @dev lo{nodad}", plan.vip(network, plan.NODE_VIPS + offset), bits[3])
    node.ip(lines)


def default_by(built: Ground, role: str) -> None:
    """Set the main table's default route."""
    gateway = built.network.gateway if role == "vlan" else plan.DEFAULT_GATEWAY
    device = built.link(role).near
    built.node.ip(
        [f"-{family} route add default via {gateway.get(family)} dev {device} onlink" for family in FAMILIES]
    )


def track_long(built: Ground) -> None:
    """Keep connections; to be called when connection tracking is in use."""
    built.node.sysctl(
        {
            f"net/netfilter/nf_conntrack_{name}": _CONNTRACK_TIMEOUT_S
            for name in ("udp_timeout", "udp_timeout_stream", "icmp_timeout", "icmpv6_timeout")
        }
    )


def one_cpu() -> None:
    """Bind the calling thread, and what it starts, to the last CPU."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def pin() -> None:
    """Bind the calling thread to the last CPU, ahead of all other tasks: waiting for them would be measured."""
    one_cpu()
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
