# SPDX-License-Identifier: Apache-2.0
"""What the host itself must provide: VLAN devices and sysctls."""

from __future__ import annotations

from collections.abc import Iterator

from datapath.compiler.context import Context, NetworkContext
from datapath.compiler.vrf import emit_vrf_sysctls
from datapath.compiler.zones import zone_sysctls
from datapath.plan.rtnl import Family, Sysctl, VlanLink

#: `strict_arp`: answer only for addresses of this very device, and announce only those.
STRICT_ARP = {"arp_ignore": "1", "arp_announce": "2"}
#: With any custom ip rule the kernel looks every source up, whatever `rp_filter` says, to find packets that carry the
#: node's own addresses (`fib_validate_source`). Our check denies these; without the look-up packets are cheaper.
NO_SOURCE_LOOKUP = {"accept_local": "1"}


def emit_links(context: Context) -> tuple[VlanLink, ...]:
    """VLAN devices that the policy asks for: sorted, but a trunk before the devices on it."""
    links = {
        network.device: VlanLink(
            network.device,
            network.network.vlan.parent,
            network.network.vlan.id,
            network.network.vlan.protocol,
        )
        for network in context.networks
        if network.network.vlan is not None
    }

    def depth(link: VlanLink) -> int:
        steps = 0
        while (parent := links.get(link.parent)) is not None and steps < len(links):
            link, steps = parent, steps + 1
        return steps

    return tuple(sorted(links.values(), key=lambda link: (depth(link), link.name)))


def emit_sysctls(context: Context) -> tuple[Sysctl, ...]:
    """Settings of our own devices. `rp_filter` is not among them: see `rp_filter_exempt`."""
    parts = context.kept.sysctls.emit(context.named, context.unchanged, _network_sysctls)
    others = (*zone_sysctls(context), *emit_vrf_sysctls(context))
    return context.kept.all_sysctls.merge((*parts.values(), others))


def _network_sysctls(network: NetworkContext) -> Iterator[Sysctl]:
    values = STRICT_ARP if network.network.strict_arp else {}
    if _is_exempt(network):
        values = values | NO_SOURCE_LOOKUP
    for name, value in values.items():
        yield Sysctl(f"net/ipv4/conf/{network.device}/{name}", value)


def emit_rp_filter_exempt(context: Context) -> tuple[str, ...]:
    """Devices whose kernel check must be off: loose mode, too, drops all on a device without an address."""
    return tuple(sorted({network.device for network in context.networks if _is_exempt(network)}))


def _is_exempt(network: NetworkContext) -> bool:
    return network.is_steered and Family.IPV4 in network.treatments
