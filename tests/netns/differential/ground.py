# SPDX-License-Identifier: Apache-2.0
"""A node, a wire to send frames on, and a table that remembers which frames got how far.

Every generated packet carries a number: the IPv4 identification or the IPv6 flow label. A packet that reaches
the observing chain leaves its number and its mark in a set, so a thousand packets cost one look.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nftables

from tests.bpf import packets
from tests.netns.nodes import inside
from tools.lab.netns import Namespace, new_prefix, remove

#: After our own chain (-250) and before conntrack (-200).
PREROUTING: Final = (("prerouting", -240),)
#: Behind the routing decision: the kernel's own rp_filter has spoken here.
ROUTED: Final = (("input", -400), ("forward", -400))

_ETH_P_ALL: Final = 3

_CHAIN: Final = """\
    chain {hook} {{
        type filter hook {hook} priority {priority}; policy accept;
        iifname != {{ {devices} }} accept
        ct state invalid,new,established,related counter
        meta nfproto ipv4 update @v4 {{ ip id . meta mark }} drop
        meta nfproto ipv6 update @v6 {{ ip6 flowlabel . meta mark }} drop
    }}
"""


@dataclass(frozen=True, slots=True)
class Number:
    """What a packet is known by: its IP version and its identification or flow label."""

    version: int
    value: int


class Ground:
    """A namespace `node` with devices, and the far ends of these devices in another one.

    Attributes:
        node: where policies are applied.
        devices: on the node; all have the same MAC address, that of `tests.bpf.packets`.
    """

    def __init__(self, node: Namespace, wire: Namespace, devices: Sequence[str]) -> None:
        self.node = node
        self.devices = tuple(devices)
        self._wire = wire
        self._sockets: dict[str, socket.socket] = {}

    def build(self) -> None:
        """Make everything but the addresses and routes of the node."""
        for namespace in (self.node, self._wire):
            namespace.create()
        # Whatever the far ends said by themselves would be counted.
        self._wire.sysctl({f"net/ipv6/conf/{name}/disable_ipv6": 1 for name in ("all", "default")})
        quiet = {f"net/ipv6/conf/{name}/addr_gen_mode": 1 for name in ("all", "default")}
        forwarding = {"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1}
        off = {f"net/ipv4/conf/{name}/rp_filter": 0 for name in ("all", "default")}
        self.node.sysctl(quiet | forwarding | off)
        mac = packets.NODE_MAC.hex(":")
        for device in self.devices:
            self.node.ip(
                [
                    f"link add {device} address {mac} type veth peer name {device} netns {self._wire.name}",
                    f"link set {device} up",
                ]
            )
            self._wire.ip([f"link set {device} arp off up"])
            raw = self._wire.socket(socket.AF_PACKET, socket.SOCK_RAW)
            raw.bind((device, 0))
            self._sockets[device] = raw
        for namespace in (self.node, self._wire):
            namespace.settle()

    def close(self) -> None:
        """Remove everything."""
        for raw in self._sockets.values():
            raw.close()
        for namespace in (self.node, self._wire):
            remove(namespace.name)

    def send(self, device: str, frame: bytes) -> None:
        """One frame into a device of the node."""
        self._sockets[device].send(frame)

    def listen(self, device: str) -> socket.socket:
        """A socket that gets what leaves the node by a device, and what is sent into it (`PACKET_OUTGOING`)."""
        raw = self._wire.socket(socket.AF_PACKET, socket.SOCK_RAW)
        raw.bind((device, _ETH_P_ALL))
        raw.setblocking(False)
        return raw

    def observe(self, hooks: Iterable[tuple[str, int]], devices: Sequence[str] = ()) -> None:
        """Put the observing table in place; packets end in it. `ct` is there for the reassembly of fragments."""
        names = ", ".join(f'"{device}"' for device in devices or self.devices)
        chains = "".join(
            _CHAIN.format(hook=hook, priority=priority, devices=names) for hook, priority in hooks
        )
        sets = "".join(
            f"    set v{version} {{ typeof {key} . meta mark; flags dynamic; size 65535; }}\n"
            for version, key in ((4, "ip id"), (6, "ip6 flowlabel"))
        )
        self.node.nft(f"table inet seen\ndelete table inet seen\ntable inet seen {{\n{sets}{chains}}}\n")


class Nft:
    """libnftables in the current namespace; a process for each look would cost more than the packets."""

    def __init__(self) -> None:
        self._nft = nftables.Nftables()
        self._nft.set_json_output(True)

    def run(self, command: str) -> list[dict[str, Any]]:
        """The objects that a command lists."""
        status, output, error = self._nft.cmd(command)
        assert status == 0, f"{command}: {error}"
        return list(json.loads(output)["nftables"]) if output else []

    def seen(self) -> dict[Number, int]:
        """Number and mark of every packet that got through since the last time, and forget them."""
        found: dict[Number, int] = {}
        for version in (4, 6):
            for item in self.run(f"list set inet seen v{version}"):
                for element in item.get("set", {}).get("elem", []):
                    value, mark = element["concat"]
                    found[Number(version, value)] = mark
            self.run(f"flush set inet seen v{version}")
        return found


@contextlib.contextmanager
def ground(devices: Sequence[str], lines: Iterable[str]) -> Iterator[Ground]:
    """Build the two namespaces, run these `ip` commands in the node, and stay inside of it."""
    prefix = new_prefix()
    built = Ground(Namespace(f"{prefix}node"), Namespace(f"{prefix}wire"), devices)
    try:
        built.build()
        built.node.ip(lines)
        with inside(built.node.name):
            yield built
    finally:
        built.close()


def until(condition: Callable[[], bool], *, tries: int = 400) -> bool:
    """Ask again and again, for the softirq may run a moment after the system call that sent the packet."""
    for _ in range(tries):
        if condition():
            return True
        time.sleep(0.005)
    return False


def rp_filter(values: Mapping[str, int]) -> None:
    """Set `net.ipv4.conf.*.rp_filter` in the current namespace."""
    for name, value in values.items():
        Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text(str(value))
