# SPDX-License-Identifier: Apache-2.0
"""The node of `make test-systemd`, its two networks and their clients.

Read by the host and, in the machine, by the guest. Only the standard library: the guest is a Debian without a checkout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

UPLINK: Final = "up0"
POD: Final = ("10.244.0.2", "fd00:244::2")
POD_GATEWAY: Final = ("10.244.0.1", "fd00:244::1")
#: RFC 862.
ECHO_PORT: Final = 7
#: Nobody changes it later: udev gives persistent addresses only to devices whose address the kernel made up.
VETH_MAC: Final = "02:00:00:00:00:01"
NIC_MACS: Final = ("52:54:00:00:00:01", "52:54:00:00:00:02")


@dataclass(frozen=True, slots=True)
class Site:
    """One network: where it enters the node, and its client two hops away, in a namespace of its own.

    Attributes:
        name: of the network in the policy, and of the client's namespace.
        device: of the node, as the policy names it.
        mac: of that device.
        port: the client's end of the cable; it is in the node's namespace until the guest moves it.
        vlan: tag that the client sends with; 0 for none.
        prefixes: without their last number; IPv4, IPv6.
        clients: addresses behind the client's router.
    """

    name: str
    device: str
    mac: str
    port: str
    vlan: int
    prefixes: tuple[str, str]
    clients: tuple[str, str]

    @property
    def gateways(self) -> tuple[str, str]:
        return self.prefixes[0] + "1", self.prefixes[1] + "1"

    @property
    def node_vips(self) -> tuple[str, str]:
        """Addresses of the node itself."""
        return self.prefixes[0] + "10", self.prefixes[1] + "10"

    @property
    def pod_vips(self) -> tuple[str, str]:
        """Addresses that DNAT leads to the pod, as kube-proxy does."""
        return self.prefixes[0] + "11", self.prefixes[1] + "11"


SITES: Final = (
    # The usual node: a VLAN on a network card, which is there before the network is configured.
    Site(
        "trunk",
        *("eth0", NIC_MACS[0], "eth1", 100),
        prefixes=("198.51.100.", "2001:db8:1::"),
        clients=("192.0.2.7", "2001:db8:99::7"),
    ),
    # A device that systemd-networkd makes, so after datapath-restore.service has run.
    Site(
        "late",
        *("vip0", VETH_MAC, "vip0-peer", 0),
        prefixes=("203.0.113.", "2001:db8:3::"),
        clients=("192.0.2.8", "2001:db8:99::8"),
    ),
)


def policy() -> str:
    """The policy file of the node."""
    text = 'version: 1\nnode:\n  internal: [10.244.0.0/16, "fd00:244::/64"]\nnetworks:\n'
    for site in SITES:
        place = (
            f"vlan: {{parent: {site.device}, id: {site.vlan}}}" if site.vlan else f"interface: {site.device}"
        )
        text += (
            f"  - name: {site.name}\n    {place}\n"
            f'    vips: [{site.prefixes[0]}0/24, "{site.prefixes[1]}/64"]\n'
            f'    gateway: [{site.gateways[0]}, "{site.gateways[1]}"]\n'
        )
    return text


def nftables_conf() -> str:
    """What nftables.service loads: first the flush of Debian's own file, then the services of the node."""
    rules = [
        f"{family} daddr {vip} udp dport {ECHO_PORT} dnat {family} to {pod}"
        for site in SITES
        for family, vip, pod in zip(("ip", "ip6"), site.pod_vips, POD, strict=True)
    ]
    chain = "type nat hook prerouting priority dstnat; policy accept;"
    body = "\n".join(f"    {rule}" for rule in rules)
    table = f"table inet services {{\n  chain prerouting {{\n    {chain}\n{body}\n  }}\n}}\n"
    return f"#!/usr/sbin/nft -f\nflush ruleset\n{table}"


def files() -> dict[str, str]:
    """Path in the node -> text. Its default route leads where nobody is."""
    vips = "".join(
        f"Address={vip}/{bits}\n"
        for site in SITES
        for vip, bits in zip(site.node_vips, (32, 128), strict=True)
    )
    return {
        "etc/datapath/policy.yaml": policy(),
        "etc/nftables.conf": nftables_conf(),
        "etc/sysctl.d/90-forward.conf": "net.ipv4.ip_forward = 1\nnet.ipv6.conf.all.forwarding = 1\n",
        "etc/systemd/network/10-vip.netdev": (
            f"[NetDev]\nName=vip0\nKind=veth\nMACAddress={VETH_MAC}\n[Peer]\nName=vip0-peer\n"
        ),
        "etc/systemd/network/10-up.netdev": f"[NetDev]\nName={UPLINK}\nKind=dummy\n",
        "etc/systemd/network/20-vip.network": (
            "[Match]\nName=vip0 eth0\n[Network]\nLinkLocalAddressing=ipv6\nIPv6AcceptRA=no\n"
            "[Link]\nRequiredForOnline=no\n"
        ),
        "etc/systemd/network/20-up.network": (
            f"[Match]\nName={UPLINK}\n[Network]\nIPv6AcceptRA=no\nAddress=10.0.0.2/24\nAddress=2001:db8:2::2/64\n"
            f"{vips}Gateway=10.0.0.1\nGateway=2001:db8:2::1\n"
        ),
        # Early: the clients are there before the node is.
        "etc/systemd/system/datapath-check.service": (
            "[Unit]\nDefaultDependencies=no\nWants=network-online.target\n"
            "After=local-fs.target systemd-udevd.service systemd-tmpfiles-setup.service\n"
            "[Service]\nType=simple\nWorkingDirectory=/srv\nExecStart=/usr/bin/python3 -m tools.deb.guest\n"
            "StandardOutput=journal+console\nStandardError=journal+console\nTimeoutStopSec=5s\n"
            "[Install]\nWantedBy=sysinit.target\n"
        ),
        "etc/hostname": "node\n",
    }
