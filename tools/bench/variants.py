# SPDX-License-Identifier: Apache-2.0
"""What is compared: each variant configures a ground of its own.

Ours is always installed by `datapath apply` from a policy file, never by rules of the benchmark; what a daemon does by
itself in the minutes after that is done, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tools.bench import frames, plan
from tools.bench.finish_moving import hurried
from tools.bench.ground import Ground, default_by, track_long
from tools.bench.programs import Programs
from tools.lab import classic
from tools.lab.dnat import NAT_CHAINS
from tools.lab.netns import LabError
from tools.lab.topology import FAMILIES

#: One that is far from the tables of the kernel (253 to 255), with room for all networks.
_FIRST_TABLE: Final = 1000
_FIRST_PRIORITY: Final = 10000

Install = Callable[[Ground], None]


class UnavailableError(Exception):
    """A variant cannot be had here; the text says why."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to do it.

    Attributes:
        name: on the command line.
        title: in tables.
        has_networks: it exists for any number of networks; otherwise it is measured once.
        drops_spoofed: families whose spoofed packets it must drop.
        is_floor: frames end at the node's tc ingress.
        is_tracked: it uses connection tracking.
        most_networks: with more, its set-up alone takes minutes.
    """

    name: str
    title: str
    install: Install
    has_networks: bool = True
    drops_spoofed: tuple[int, ...] = FAMILIES
    is_floor: bool = False
    is_tracked: bool = True
    most_networks: int = plan.NETWORKS_MAX

    def drops(self, profile: frames.Profile, family: int) -> bool:
        """Whether none of these frames must arrive."""
        return profile.is_spoofed and family in self.drops_spoofed


def _no_policy(built: Ground) -> None:
    """The VLAN is the default route, so that replies leave by it without any policy."""
    default_by(built, "vlan")


def _tracked(built: Ground) -> None:
    _no_policy(built)
    _track(built)


def _track(built: Ground) -> None:
    """Connection tracking is in use; the chain that asks for it is one that no forwarded packet sees."""
    built.node.nft(
        "table inet base { chain output { type filter hook output priority 0; ct state invalid drop; }; }"
    )
    track_long(built)


def _kernel_filter(built: Ground) -> None:
    _tracked(built)
    built.node.sysctl({f"net/ipv4/conf/{name}/rp_filter": 1 for name in ("all", "default", built.vlan.near)})


def _one_rule(built: Ground) -> None:
    """What the existence of any ip rule costs all traffic: who steers by rules cannot be below it."""
    _tracked(built)
    rule = f"fwmark 1/1 lookup {_FIRST_TABLE} priority {_FIRST_PRIORITY}"
    built.node.ip([f"-{family} rule add {rule}" for family in FAMILIES])


def _classic(tool: classic.Tool) -> Install:
    def install(built: Ground) -> None:
        default_by(built, "default")
        networks = [plan.network(number) for number in built.networks]
        classic.apply_to(built.node, networks, tool, first_table=_FIRST_TABLE)
        track_long(built)

    return install


def _hand_written(built: Ground) -> None:
    """What one would write today without a controller: maps and fib in nftables, one ip rule per network."""
    default_by(built, "default")
    networks = [plan.network(number) for number in built.networks]
    marks = ", ".join(f'"{one.device}" : {number}' for number, one in enumerate(networks, start=1))
    built.node.nft(
        f"""
table inet hand {{
  map networks {{ type ifname : mark; elements = {{ {marks} }}; }}
  set uplinks {{ type ifname; elements = {{ {", ".join(f'"{one.device}"' for one in networks)} }}; }}
  chain check {{
    type filter hook prerouting priority -300;
    iifname @uplinks meta mark set iifname map @networks
    iifname @uplinks fib saddr . mark . iif oif missing drop
  }}
  chain save {{
    type filter hook prerouting priority -140;
    ct direction reply meta mark set ct mark
    ct direction original iifname @uplinks ct mark set meta mark
    ct direction original iifname @uplinks meta mark set 0
  }}
  chain output {{ type route hook output priority -140; ct direction reply meta mark set ct mark; }}
}}
"""
    )
    internal = {4: f"{plan.INTERNAL.v4}/12", 6: f"{plan.INTERNAL.v6}/48"}
    lines = []
    for number, one in enumerate(networks, start=1):
        for family in FAMILIES:
            table = _FIRST_TABLE + number
            pods = f"{internal[family]} via {plan.POD.get(family)} dev {plan.POD_DEVICE}"
            lines += [
                f"-{family} route add {one.prefixes[family]} dev {one.device} table {table}",
                f"-{family} route add default via {one.gateway.get(family)} dev {one.device} table {table} onlink",
                # Or the default route would call a forged source in the pods' prefix feasible.
                f"-{family} route add {pods} table {table}",
                f"-{family} rule add fwmark {number:#x} lookup {table} priority {_FIRST_PRIORITY + number}",
            ]
    # The batch of one family after the other: one process each instead of one per line.
    built.node.ip(sorted(lines, key=lambda line: line[:2]))
    built.node.sysctl({f"net/ipv4/conf/{one.device}/rp_filter": 0 for one in networks})
    track_long(built)


def _ours(backend: str) -> Install:
    def install(built: Ground) -> None:
        default_by(built, "default")
        apply(built, plan.policy(built.networks, backend=backend))
        track_long(built)

    return install


def _direct(*, is_tracked: bool) -> Install:
    """It needs no connection tracking, but the nodes that we compare with have it: kube-proxy asks for it."""

    def install(built: Ground) -> None:
        default_by(built, "default")
        apply(built, plan.policy(built.networks, backend="ebpf", steering="direct"))
        if is_tracked:
            _track(built)

    return install


def apply(built: Ground, text: str) -> None:
    """`datapath apply`, as an operator would, and what a daemon does with many devices in the minutes after it.

    Raises:
        UnavailableError: it refuses the policy or the host; with its words.
    """
    path = built.files / "policy.yaml"
    path.write_text(text, encoding="utf-8")
    state = str(built.files / "state")
    try:
        built.node.run(sys.executable, "-m", "datapath", "apply", str(path), "--json", "--state-dir", state)
        with hurried():
            built.node.run(sys.executable, "-m", "tools.bench.finish_moving", state)
    except LabError as error:
        lines = [line for line in str(error).splitlines() if "rror" in line] or [str(error)]
        raise UnavailableError(lines[-1].rpartition("error: ")[2][:400]) from error


def floor(programs: Programs) -> Variant:
    """The generator and one tc program that drops."""

    def install(built: Ground) -> None:
        built.node.call(lambda: programs.attach_tc("node", built.vlan.ifindex))
        built.node.call(lambda: programs.attach_tc("node", built.default.ifindex))

    return Variant(FLOOR, _FLOOR_TITLE, install, has_networks=False, is_floor=True, is_tracked=False)


#: What all others are compared with, in the same repetition, on a node with as many devices.
BASE: Final = "base"

VARIANTS: Final = (
    Variant("plain", "plain forwarding", _no_policy, has_networks=False, drops_spoofed=(), is_tracked=False),
    Variant(BASE, "plain forwarding + connection tracking", _tracked, drops_spoofed=()),
    Variant("base2", "a copy of it (noise)", _tracked, has_networks=False, drops_spoofed=()),
    Variant("base3", "another copy (noise)", _tracked, has_networks=False, drops_spoofed=()),
    Variant(
        "rp_filter",
        "rp_filter=1 + connection tracking",
        _kernel_filter,
        has_networks=False,
        drops_spoofed=(4,),
    ),
    Variant("one-rule", "one ip rule that matches nothing", _one_rule, has_networks=False, drops_spoofed=()),
    Variant("classic-legacy", "classic recipe, iptables-legacy", _classic("iptables-legacy")),
    Variant("classic-nft", "classic recipe, iptables-nft", _classic("iptables-nft")),
    Variant("hand-nft", "nft by hand: maps, fib, one ip rule each", _hand_written),
    Variant("ebpf-rules", "datapath, eBPF, steering: rules", _ours("ebpf")),
    Variant("nft-rules", "datapath, nft, steering: rules", _ours("nft"), most_networks=1000),
    Variant("ebpf-direct", "datapath, eBPF, steering: direct", _direct(is_tracked=True)),
    Variant(
        "untracked-direct",
        "the same without connection tracking",
        _direct(is_tracked=False),
        is_tracked=False,
    ),
)


#: Titles by name, in the order of tables.
FLOOR: Final = "floor"
_FLOOR_TITLE: Final = "harness: dropped at tc ingress"
TITLES: Final = {FLOOR: _FLOOR_TITLE} | {variant.name: variant.title for variant in VARIANTS}


def by_name(name: str) -> Variant:
    """One of `VARIANTS`."""
    return next(variant for variant in VARIANTS if variant.name == name)


def install_dnat(built: Ground) -> None:
    """DNAT as kube-proxy's nftables mode makes it, reduced to the eight addresses that need it."""
    for family in FAMILIES:
        ip, kind = ("ip", "ipv4_addr") if family == 4 else ("ip6", "ipv6_addr")
        pod = plan.POD.get(family)
        to = f"[{pod}]:{frames.BACKEND_PORT}" if family == 6 else f"{pod}:{frames.BACKEND_PORT}"
        vips = [plan.vip(built.network, plan.DNAT_VIPS + offset).get(family) for offset in range(plan.VIPS)]
        elements = ", ".join(f"{vip} . udp . {frames.SERVICE_PORT} : goto service" for vip in vips)
        elements += "".join(f", {vip} . tcp . {frames.SERVICE_PORT} : goto service" for vip in vips)
        built.node.nft(
            f"""
table {ip} kube-proxy {{
  map service-ips {{ type {kind} . inet_proto . inet_service : verdict; elements = {{ {elements} }}; }}
  chain service {{
    {ip} saddr {pod} jump mark-for-masquerade
    meta l4proto {{ tcp, udp }} dnat to {to}
  }}
  chain services {{ {ip} daddr . meta l4proto . th dport vmap @service-ips; }}
{NAT_CHAINS}}}
"""
        )
