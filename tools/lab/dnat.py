# SPDX-License-Identifier: Apache-2.0
"""DNAT of the VIPs as kube-proxy's iptables mode and its nftables mode make it, reduced to what the lab serves.

Taken from kube-proxy: chain names, hooks and priorities, the masquerade mark 0x4000, hairpin masquerade,
masquerade of what is sent to another node (``externalTrafficPolicy: Cluster``) and none for a local
endpoint (``Local``). ICMP echo is not a thing that kube-proxy forwards: it is here so that a ping can test every path.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tools.lab.netns import Namespace
from tools.lab.topology import (
    BACKEND_PORT,
    FAMILIES,
    POD_CIDRS,
    SERVICE_PORT,
    Backend,
    IpAddress,
    Network,
    backend_address,
)


class Dnat(enum.StrEnum):
    """Whose kind of rules do the DNAT."""

    IPTABLES_LEGACY = "iptables-legacy"
    IPTABLES_NFT = "iptables-nft"
    NFTABLES = "nftables"


@dataclass(frozen=True, slots=True)
class Service:
    """One VIP and where it goes."""

    vip: IpAddress
    backend: IpAddress
    masquerade: bool

    @property
    def chain(self) -> str:
        """A chain name of kube-proxy's shape (its own has a hash)."""
        return f"KUBE-SVC-{self.vip.packed.hex()[-12:].upper()}"


def services(networks: Sequence[Network], family: int) -> Iterator[Service]:
    """Return every DNATed VIP of one family, each once."""
    seen = set()
    for network in networks:
        for backend, vips in network.vips.items():
            vip = vips.get(family)
            if backend is not Backend.HOST_VIP and vip not in seen:
                seen.add(vip)
                yield Service(
                    vip, backend_address(backend).get(family), masquerade=backend is Backend.REMOTE_POD
                )


def install(node: Namespace, flavour: Dnat, networks: Sequence[Network]) -> None:
    """Install the rules on the node.

    Raises:
        LabError: a rule was refused.
    """
    for family in FAMILIES:
        chosen = list(services(networks, family))
        if flavour is Dnat.NFTABLES:
            node.nft(_nft(family, chosen))
        else:
            program = flavour.value.replace("iptables", "iptables" if family == 4 else "ip6tables")
            node.run(f"{program}-restore", "--noflush", stdin=_iptables(family, chosen))


def _iptables(family: int, chosen: Sequence[Service]) -> str:
    icmp = "icmp" if family == 4 else "ipv6-icmp"
    echo = "--icmp-type 8" if family == 4 else "--icmpv6-type 128"
    cidr = POD_CIDRS[family]
    lines = ["*nat", ":KUBE-SERVICES - [0:0]", ":KUBE-MARK-MASQ - [0:0]", ":KUBE-POSTROUTING - [0:0]"]
    lines += [f":{s.chain} - [0:0]" for s in chosen]
    lines += [
        '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
        "-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000",
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
        "-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000",
        "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
        f"-A POSTROUTING -s {cidr} ! -d {cidr} -o eth0 -j MASQUERADE",
    ]
    for s in chosen:
        port = f"[{s.backend}]:{BACKEND_PORT}" if family == 6 else f"{s.backend}:{BACKEND_PORT}"
        lines += [
            f"-A KUBE-SERVICES -d {s.vip} -p {p} -m {p} --dport {SERVICE_PORT} -j {s.chain}"
            for p in ("tcp", "udp")
        ]
        lines.append(
            f"-A KUBE-SERVICES -d {s.vip} -p {icmp} -m {icmp.replace('ipv6-icmp', 'icmp6')} {echo} -j {s.chain}"
        )
        hairpin = "" if s.masquerade else f"-s {s.backend} "
        lines.append(f"-A {s.chain} {hairpin}-j KUBE-MARK-MASQ")
        lines += [f"-A {s.chain} -p {p} -m {p} -j DNAT --to-destination {port}" for p in ("tcp", "udp")]
        lines.append(f"-A {s.chain} -p {icmp} -j DNAT --to-destination {s.backend}")
    return "\n".join([*lines, "COMMIT", ""])


#: Of kube-proxy's table, around its chains for services: what jumps to `services`, and masquerading.
NAT_CHAINS: Final = """\
  chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
  chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
  chain nat-output { type nat hook output priority -100; jump services; }
  chain masquerading {
    meta mark & 0x4000 == 0 return
    meta mark set meta mark xor 0x4000
    masquerade fully-random
  }
  chain nat-postrouting { type nat hook postrouting priority 100; jump masquerading; }
"""


def _nft(family: int, chosen: Sequence[Service]) -> str:
    ip, addr = ("ip", "ipv4_addr") if family == 4 else ("ip6", "ipv6_addr")
    icmp = "icmp" if family == 4 else "icmpv6"
    chains, ports, echoes = [], [], []
    for s in chosen:
        name = s.chain.lower().replace("kube-svc", "service")
        to = f"[{s.backend}]:{BACKEND_PORT}" if family == 6 else f"{s.backend}:{BACKEND_PORT}"
        hairpin = "" if s.masquerade else f"{ip} saddr {s.backend} "
        chains.append(f"""
  chain {name} {{
    {hairpin}jump mark-for-masquerade
    meta l4proto {{ tcp, udp }} dnat to {to}
    {icmp} type echo-request dnat to {s.backend}
  }}""")
        ports += [f"{s.vip} . {p} . {SERVICE_PORT} : goto {name}" for p in ("tcp", "udp")]
        echoes.append(f"{s.vip} : goto {name}")
    return f"""
table {ip} kube-proxy {{
  map service-ips {{ type {addr} . inet_proto . inet_service : verdict; elements = {{ {", ".join(ports)} }} }}
  map echo-ips {{ type {addr} : verdict; elements = {{ {", ".join(echoes)} }} }}
{"".join(chains)}
  chain services {{
    {ip} daddr . meta l4proto . th dport vmap @service-ips
    {icmp} type echo-request {ip} daddr vmap @echo-ips
  }}
{NAT_CHAINS}}}
table {ip} cni {{
  chain postrouting {{
    type nat hook postrouting priority 99;
    {ip} saddr {POD_CIDRS[family]} {ip} daddr != {POD_CIDRS[family]} oifname "eth0" masquerade
  }}
}}
"""
