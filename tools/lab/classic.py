# SPDX-License-Identifier: Apache-2.0
"""The well-known recipe "Configuring routing for MetalLB in L2 mode", case 4 with connection marks, as it is published.

It is here to be compared with: iptables CONNMARK, `ip rule from VIPs fwmark`, `rp_filter` off, and the iptables
`rpfilter` match in its place. The article is IPv4 only; the same commands are given for IPv6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tools.lab.lab import Lab
from tools.lab.netns import Namespace
from tools.lab.topology import FAMILIES, Network

Tool = Literal["iptables-legacy", "iptables-nft"]


def apply(lab: Lab, tool: Tool = "iptables-nft") -> None:
    """Configure the lab's node by the recipe.

    Raises:
        LabError: a command was refused.
    """
    apply_to(lab.node, lab.networks, tool)


def apply_to(
    node: Namespace, networks: Sequence[Network], tool: Tool = "iptables-nft", *, first_table: int = 100
) -> None:
    """Configure any namespace by the recipe, one mark and one table per network (0x100 for the first).

    Args:
        node: the namespace.
        networks: its networks.
        tool: which iptables.
        first_table: of the first network; with many, one from which none of the kernel's own (253 to 255) is reached.
    """
    lines = [
        line
        for index, network in enumerate(networks)
        for line in _routing(network, table=first_table + index, mark=0x100 * (index + 1))
    ]
    # By family: each run of lines of one family is one process, whatever their number.
    node.ip(sorted(lines, key=lambda line: line[:2]))
    node.sysctl(
        {"net/ipv4/conf/all/rp_filter": 0} | {f"net/ipv4/conf/{n.device}/rp_filter": 0 for n in networks}
    )
    for family in FAMILIES:
        program = tool if family == 4 else tool.replace("iptables", "ip6tables")
        node.run(f"{program}-restore", "--noflush", stdin=tables(networks, family))


def _routing(network: Network, *, table: int, mark: int) -> list[str]:
    lines = []
    for family in FAMILIES:
        prefix, gateway = network.prefixes[family], network.gateway.get(family)
        lines += [
            f"-{family} route add {prefix} dev {network.device} table {table}",
            f"-{family} route add default via {gateway} dev {network.device} table {table}",
            f"-{family} rule add from {prefix} fwmark {mark:#x} lookup {table}",
        ]
    return lines


def tables(networks: Sequence[Network], family: int) -> str:
    """Return the recipe's rules of one family for `iptables-restore`."""
    mangle = [
        "*mangle",
        "-A PREROUTING -j CONNMARK --restore-mark",
        "-A PREROUTING -m mark ! --mark 0 -j RETURN",
    ]
    raw = ["*raw"]
    for index, network in enumerate(networks):
        mangle.append(f"-A PREROUTING -i {network.device} -j MARK --set-mark {0x100 * (index + 1):#x}")
        raw += [
            f"-A PREROUTING -i {network.device} -d {network.prefixes[family]} -j RETURN",
            f"-A PREROUTING -i {network.device} -m rpfilter --invert -j DROP",
        ]
    return "\n".join([*mangle, "-A POSTROUTING -j CONNMARK --save-mark", "COMMIT", *raw, "COMMIT", ""])
