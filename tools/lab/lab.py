# SPDX-License-Identifier: Apache-2.0
"""The lab: design section 3's node with its surroundings, in network namespaces.

::

    client, client_overlap -- router --(VLAN: eth0.100)-- node --(eth0)-- gw (drops wrong-way replies)
                    client_vlan -'                        | |           `- node2 -- pod_remote
                                                       pod_a pod_b
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, Self

from tools.lab import dnat as dnat_rules
from tools.lab import topology as topo
from tools.lab.announce import Announcer
from tools.lab.dnat import Dnat
from tools.lab.netns import Namespace, new_prefix, remove
from tools.lab.observe import LinkCounter
from tools.lab.servers import Reactor
from tools.lab.topology import Backend, Network, Pair

VlanMode = Literal["veth", "8021q"]


@dataclass(frozen=True, slots=True)
class RpFilter:
    """`net.ipv4.conf.*.rp_filter` of the node before anything is applied: 0 off, 1 strict, 2 loose."""

    all: int = 0
    default: int = 0
    devices: Mapping[str, int] = field(default_factory=dict)


class Lab:
    """A context manager that builds the lab and removes it, whatever happens.

    Args:
        networks: what clients come from; default one, VLAN 100.
        dnat: whose rules do the DNAT.
        vlan: ``veth`` (a veth pair whose node end has the VLAN device's name; needs no 802.1Q in the kernel)
            or ``8021q`` (eth0 is a trunk, whose tagged frames end at the gateway's port; the policy asks for the VLAN
            device, so it comes with the policy: call `announce` then).
        vlan_address: give the node's VLAN devices an address (host part 9); the usual MetalLB set-up has none.
            Only with ``veth``: elsewhere there is no device yet.
        rp_filter: the node's initial values.
        datagrams: serve UDP; False leaves that to `tools.lab.flows`, which counts each datagram.

    Attributes:
        prefix: what all namespace names of this lab begin with.
        by_vlan: per network name, what left the node on that VLAN; replies to other networks' clients and what is
            for pods are dropped there.
        by_gateway: what left the node on eth0 towards anyone; wrong-way replies are dropped there.
    """

    def __init__(  # noqa: PLR0913  (each is one independent choice; most tests need none)
        self,
        *,
        networks: Sequence[Network] | None = None,
        dnat: Dnat = Dnat.NFTABLES,
        vlan: VlanMode = "veth",
        vlan_address: bool = False,
        rp_filter: RpFilter | None = None,
        datagrams: bool = True,
    ) -> None:
        self.networks = tuple(networks) if networks is not None else (topo.network(),)
        self.dnat = dnat
        self.prefix = new_prefix()
        self._vlan = vlan
        self._vlan_address = vlan_address
        self._rp_filter = rp_filter or RpFilter()
        self._datagrams = datagrams
        self._namespaces: dict[str, Namespace] = {}
        self._reactor: Reactor | None = None
        self._old_sigterm: Callable[[int, FrameType | None], object] | int | None = None
        self.by_vlan: dict[str, LinkCounter] = {}
        self.by_gateway: LinkCounter

    def __getitem__(self, role: str) -> Namespace:
        """Return the namespace of a role: ``node``, ``gw``, ``client``, ``router2``..."""
        return self._namespaces[role]

    @property
    def node(self) -> Namespace:
        """The node's namespace."""
        return self["node"]

    def namespaces(self) -> tuple[Namespace, ...]:
        """Every namespace of this lab."""
        return tuple(self._namespaces.values())

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._old_sigterm = signal.signal(signal.SIGTERM, _terminate)
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything; may be called twice."""
        if self._reactor:
            self._reactor.close()
            self._reactor = None
        for namespace in self._namespaces.values():
            remove(namespace.name)
        self._namespaces.clear()
        if self._old_sigterm is not None:
            signal.signal(signal.SIGTERM, self._old_sigterm)
            self._old_sigterm = None

    # -- building ---------------------------------------------------------------------------------

    def _build(self) -> None:
        self._reactor = Reactor()
        for role in ("gw", "node", "node2"):
            self._add(role)
        self.node.sysctl({"net/ipv4/conf/default/rp_filter": self._rp_filter.default})
        self._build_lan()
        for role, owner, addresses in (
            ("pod_a", "node", topo.POD_A),
            ("pod_b", "node", topo.POD_B),
            ("pod_remote", "node2", topo.POD_REMOTE),
        ):
            self._leaf(role, owner, addresses)
        for network in self.networks:
            self._build_network(network)
        self._route_lan()
        self.node.sysctl(
            {"net/ipv4/conf/all/rp_filter": self._rp_filter.all}
            | {f"net/ipv4/conf/{d}/rp_filter": v for d, v in self._rp_filter.devices.items()}
        )
        dnat_rules.install(self.node, self.dnat, self.networks)
        for namespace in self.namespaces():
            namespace.settle()
        self._observe()
        self._serve()

    def _add(self, role: str, *, forwarding: bool = True) -> Namespace:
        namespace = Namespace(self.prefix + role)
        self._namespaces[role] = namespace
        namespace.create()
        off = {f"net/ipv4/conf/{which}/rp_filter": 0 for which in ("all", "default")}
        # The lab sends many errors on purpose; the kernel would keep most of them back. A handshake that went
        # the wrong way must not be tried again by the server: it would show up among the next probes' packets.
        limits = {
            "net/ipv4/icmp_ratelimit": 0,
            "net/ipv6/icmp/ratelimit": 0,
            "net/ipv4/tcp_synack_retries": 0,
        }
        forward = {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1} if forwarding else {}
        namespace.sysctl(off | limits | forward)
        return namespace

    def _build_lan(self) -> None:
        gw = self["gw"]
        gw.ip(
            [
                "link add br-lan type bridge forward_delay 0",
                "link set br-lan up",
                f"addr add {topo.GW.v4}/24 dev br-lan",
                f"addr add {topo.GW.v6}/64 dev br-lan",
                f"addr add {topo.ELSEWHERE.v4}/32 dev lo",
                f"addr add {topo.ELSEWHERE.v6}/128 dev lo",
            ]
        )
        for role, addresses in (("node", topo.NODE), ("node2", topo.NODE2)):
            self[role].ip(
                [
                    f"link add eth0 type veth peer name {role} netns {gw.name}",
                    "link set eth0 up",
                    f"addr add {addresses.v4}/24 dev eth0",
                    f"addr add {addresses.v6}/64 dev eth0",
                    f"route add default via {topo.GW.v4} dev eth0",
                    f"-6 route add default via {topo.GW.v6} dev eth0",
                ]
            )
            gw.ip([f"link set {role} master br-lan", f"link set {role} up"])

    def _leaf(self, role: str, owner: str, addresses: Pair) -> None:
        """Add a namespace with one routed link, as Calico does it: nothing but its owner is reachable on-link."""
        device = f"to-{role}"[:15]
        leaf = self._add(role, forwarding=False)
        leaf.ip(
            [
                f"link add eth0 type veth peer name {device} netns {self[owner].name}",
                "link set eth0 up",
                f"addr add {addresses.v4}/32 dev eth0",
                f"addr add {addresses.v6}/128 dev eth0",
                "route add default via 169.254.1.1 dev eth0 onlink",
                "-6 route add default via fe80::1 dev eth0",
            ]
        )
        self[owner].ip(
            [
                f"link set {device} up",
                f"addr add 169.254.1.1/32 dev {device} scope link",
                f"addr add fe80::1/64 dev {device}",
                f"route add {addresses.v4}/32 dev {device}",
                f"-6 route add {addresses.v6}/128 dev {device}",
            ]
        )

    def _build_network(self, network: Network) -> None:
        router = self._add(network.role("router"))
        vlan_client = self._add(network.role("client_vlan"), forwarding=False)
        router.ip(
            [
                "link add br-vlan type bridge forward_delay 0",
                "link set br-vlan up",
                f"addr add {network.gateway.v4}/24 dev br-vlan",
                f"addr add {network.gateway.v6}/64 dev br-vlan",
            ]
        )
        vlan_client.ip(
            [
                f"link add eth0 type veth peer name vclient netns {router.name}",
                "link set eth0 up",
                f"addr add {network.client_vlan.v4}/24 dev eth0",
                f"addr add {network.client_vlan.v6}/64 dev eth0",
                f"route add default via {network.gateway.v4} dev eth0",
                f"-6 route add default via {network.gateway.v6} dev eth0",
            ]
        )
        if self._vlan == "veth":
            self.node.ip(
                [
                    f"link add {network.device} type veth peer name node netns {router.name}",
                    f"link set {network.device} up",
                ]
            )
        else:
            # A VLAN device may leave its trunk's namespace; the tag still ends at the gateway's port.
            self["gw"].ip(
                [
                    f"link add link node name vlan-node type vlan id {network.vlan_id}",
                    f"link set vlan-node netns {router.name} name node",
                ]
            )
        if self._vlan_address and self._vlan == "veth":
            self.add_vlan_address(network)
        router.ip(
            [
                "link set node master br-vlan",
                "link set node up",
                "link set vclient master br-vlan",
                "link set vclient up",
            ]
        )
        for base in ("client", "client_overlap"):
            self._leaf(network.role(base), network.role("router"), network.clients[network.role(base)])
        self._add_vips(network, router, vlan_client)

    def _add_vips(self, network: Network, router: Namespace, vlan_client: Namespace) -> None:
        held = network.vips[Backend.HOST_VIP]
        self.node.ip([f"addr replace {held.v4}/32 dev lo", f"addr replace {held.v6}/128 dev lo"])
        own = str(network.gateway.v4).rsplit(".", 1)[0] + "."
        foreign = [vips for vips in network.vips.values() if not str(vips.v4).startswith(own)]
        for namespace, device in ((router, "br-vlan"), (vlan_client, "eth0")):
            namespace.ip(
                line
                for vips in foreign
                for line in (
                    f"route add {vips.v4}/32 dev {device}",
                    f"-6 route add {vips.v6}/128 dev {device}",
                )
            )

    def _route_lan(self) -> None:
        """Routes between the nodes; pods of node2 come to the VIPs through the node, not by DNAT of their own."""
        self.node.ip(
            [
                f"route add 10.112.2.0/24 via {topo.NODE2.v4}",
                f"-6 route add fd00:10:112:2::/64 via {topo.NODE2.v6}",
            ]
        )
        vips = {a for n in self.networks for p in n.vips.values() for a in p}
        self["node2"].ip(
            [
                f"route add 10.112.1.0/24 via {topo.NODE.v4}",
                f"-6 route add fd00:10:112:1::/64 via {topo.NODE.v6}",
            ]
            + [f"-{a.version} route add {a} via {topo.NODE.get(a.version)}" for a in sorted(vips, key=str)]
        )

    # -- observing and serving --------------------------------------------------------------------

    def _observe(self) -> None:
        wrong = sorted({a for n in self.networks for p in n.clients.values() for a in p}, key=str)
        self.by_gateway = LinkCounter(self["gw"], "node", wrong)
        pods = {*topo.POD_A, *topo.POD_B, *topo.POD_REMOTE}
        for network in self.networks:
            own = {a for p in network.clients.values() for a in p}
            others = sorted(({*wrong} - own) | pods, key=str)
            self.by_vlan[network.name] = LinkCounter(self[network.role("router")], "node", others)

    def _serve(self) -> None:
        if self._reactor is None:
            raise RuntimeError("the lab is not built")
        if self._vlan == "veth":
            for network in self.networks:
                self.announce(network)
        # Whoever asks eth0's subnet for an overlapping client gets the gateway, which counts and drops.
        overlaps = [a for n in self.networks for a in n.client_overlap]
        self._reactor.announce(Announcer(self["gw"], "br-lan", overlaps))
        for role, addresses, port in self.places():
            for address in addresses:
                self._reactor.serve(self[role], role, address, port, datagrams=self._datagrams)

    def places(self) -> list[tuple[str, Pair, int]]:
        """Where servers are: role, addresses, port."""
        held = dict.fromkeys(n.vips[Backend.HOST_VIP] for n in self.networks)
        return [
            ("pod_a", topo.POD_A, topo.BACKEND_PORT),
            ("pod_remote", topo.POD_REMOTE, topo.BACKEND_PORT),
            ("node", topo.NODE, topo.BACKEND_PORT),
            ("gw", topo.ELSEWHERE, topo.SERVICE_PORT),
            *(("node", vip, topo.SERVICE_PORT) for vip in held),
        ]

    def hang_up(self) -> None:
        """Reset every TCP connection of the servers: none is left to say something later."""
        if self._reactor:
            self._reactor.hang_up()

    def reset_counters(self) -> None:
        """Forget what left the node so far."""
        for counter in (self.by_gateway, *self.by_vlan.values()):
            counter.reset()

    def wrong_way(self) -> int:
        """Packets that left the node by a link where they never should."""
        return sum(counter.wrong_way() for counter in (self.by_gateway, *self.by_vlan.values()))

    def announce(self, network: Network, addresses: Sequence[topo.IpAddress] = ()) -> None:
        """Answer ARP and neighbour discovery on the node for a network's VIPs, or for some other addresses.

        Again, if its device was made anew.
        """
        if self._reactor is None:
            raise RuntimeError("the lab is not built")
        chosen = addresses or [a for p in network.vips.values() for a in p]
        self._reactor.announce(Announcer(self.node, network.device, chosen))

    def serve(self, role: str, addresses: Pair, port: int = topo.SERVICE_PORT) -> None:
        """One more server, beside those of `places`."""
        if self._reactor is None:
            raise RuntimeError("the lab is not built")
        for address in addresses:
            self._reactor.serve(self[role], role, address, port)

    def add_vlan_address(self, network: Network) -> None:
        """Give the node's VLAN device an address of each family, without routes to their subnets."""
        net4, net6 = (
            str(a).rsplit(s, 1)[0] for a, s in ((network.gateway.v4, "."), (network.gateway.v6, ":"))
        )
        self.node.ip(
            [
                f"addr add {net4}.9/24 dev {network.device} noprefixroute",
                f"addr add {net6}:9/64 dev {network.device} noprefixroute",
            ]
        )

    # -- policy -----------------------------------------------------------------------------------

    def policy(self, *, extra: str = "", network_extra: str = "") -> str:
        """Return the smallest policy for this lab.

        Args:
            extra: more top-level YAML.
            network_extra: more YAML of every network, indented by four spaces.
        """
        internal = ", ".join(f'"{c}"' for c in (*topo.POD_CIDRS.values(), *topo.SERVICE_CIDRS.values()))
        text = f"version: 1\nnode:\n  internal: [{internal}]\nnetworks:\n"
        for n in self.networks:
            place = (
                f"interface: {n.device}"
                if self._vlan == "veth"
                else f"vlan: {{parent: eth0, id: {n.vlan_id}}}"
            )
            vips, on_link = (
                ", ".join(f'"{p}"' for p in prefixes.values()) for prefixes in (n.vip_prefixes, n.prefixes)
            )
            text += (
                f"  - name: {n.name}\n    {place}\n    vips: [{vips}]\n"
                f'    gateway: ["{n.gateway.v4}", "{n.gateway.v6}"]\n'
                + (f"    on_link: [{on_link}]\n" if vips != on_link else "")
                + network_extra
            )
        return text + extra

    def write_policy(self, path: Path, *, extra: str = "", network_extra: str = "") -> Path:
        """Write `policy()` to a file and return its path."""
        path.write_text(self.policy(extra=extra, network_extra=network_extra))
        return path


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)
