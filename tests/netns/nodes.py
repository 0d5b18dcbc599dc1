# SPDX-License-Identifier: Apache-2.0
"""A bare node for the tests of apply itself: a namespace with devices, nobody else in it, and quick dumps."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pyroute2 import IPRoute

from tools.lab.command import program
from tools.lab.dump import tcx_programs
from tools.lab.netns import Namespace, enter, new_prefix, remove

_OWN = Path("/proc/thread-self/ns/net")


class Node:
    """A namespace with Ethernet devices ``eth1``..``ethN`` that are up, each one end of a pair with its neighbour.

    `rp_filter` differs from device to device, so that what is put back can be told from what is not.
    """

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace

    def run(self, *argv: str, stdin: str | None = None) -> str:
        """Standard output of a command in the node; LabError where it fails."""
        return self.namespace.run(*argv, stdin=stdin)

    def datapath(self, state: Path, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in the node, to its end."""
        argv = self.namespace.argv(*datapath_argv(state, verb, *arguments))
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)


def datapath_argv(state: Path, verb: str, *arguments: str) -> list[str]:
    """The argument list of one verb of this environment's own command."""
    return [sys.executable, program(), verb, *arguments, "--state-dir", str(state)]


@contextlib.contextmanager
def node(devices: int, rp_filter: Mapping[str, int] | None = None) -> Iterator[Node]:
    """Make the namespace with an even number of devices, and remove it at the end."""
    namespace = Namespace(f"{new_prefix()}node")
    namespace.create()
    try:
        lines = [f"link add eth{n} type veth peer name eth{n + 1}" for n in range(1, devices, 2)]
        lines += [f"link set eth{n} up" for n in range(1, devices + 1)]
        # Link-local addresses would come and go by themselves.
        namespace.sysctl({"net/ipv6/conf/default/addr_gen_mode": 1, "net/ipv4/ip_forward": 1})
        namespace.sysctl({"net/ipv6/conf/all/forwarding": 1})
        namespace.ip(lines)
        values = {"all": 1, "default": 1, "eth1": 2, "eth2": 0, "eth3": 2} | dict(rp_filter or {})
        namespace.sysctl({f"net/ipv4/conf/{name}/rp_filter": value for name, value in values.items()})
        # What the kernel says a little later would be a difference between dumps.
        namespace.settle()
        yield Node(namespace)
    finally:
        remove(namespace.name)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread, and the processes that it starts, in that namespace."""
    with _OWN.open() as before:
        enter(name)
        try:
            yield
        finally:
            enter(f"../../../proc/self/fd/{before.fileno()}")


def quick_dump(devices: Sequence[str]) -> dict[str, str]:
    """What we may change in the current namespace, without starting a process for each part.

    Sections: rules, routes, links, qdiscs and ingress filters as raw netlink attributes, tcx programs by name,
    rules and filters in the kernel's order, the rest sorted; the nft ruleset, and the per-device sysctls.
    """
    import nftables  # noqa: PLC0415  (Debian's own module, which only tests on the kernel need)

    nft = nftables.Nftables()
    nft.set_stateless_output(True)
    _, ruleset, _ = nft.cmd("list ruleset")
    with IPRoute() as ipr:
        filters = [
            f"{device}: {message['attrs']}"
            for device in devices
            for index in ipr.link_lookup(ifname=device)
            for message in ipr.get_filters(index=index, parent=0xFFFFFFF2)
        ]
        sections = {
            "rules": [_plain(message) for message in ipr.get_rules()],
            "routes": sorted(_plain(message) for message in ipr.get_routes()),
            "links": sorted(f"{m['index']} {m.get('IFLA_IFNAME')} {m['flags']}" for m in ipr.get_links()),
            # 6.1 lists a device elsewhere after its qdisc was made again: that is no difference.
            "qdiscs": sorted(f"{m['index']} {m['handle']:x} {m.get('TCA_KIND')}" for m in ipr.get_qdiscs()),
            "filters": filters + tcx_programs().splitlines(),
        }
    sections["sysctls"] = [
        f"{path} = {path.read_text().strip()}"
        for family in ("ipv4", "ipv6")
        for device in sorted({"all", "default", *devices})
        for path in sorted(Path(f"/proc/sys/net/{family}/conf/{device}").iterdir())
        if path.name != "stable_secret"
    ]
    return {name: "\n".join(lines) + "\n" for name, lines in sections.items()} | {"nft": str(ruleset)}


def _plain(message: Mapping[str, object]) -> str:
    """A netlink message without its sequence numbers and ages."""
    header = {key: message[key] for key in sorted(message) if key not in {"header", "attrs", "event"}}
    attributes = [a for a in message["attrs"] if a[0] not in {"RTA_CACHEINFO", "UNKNOWN"}]  # type: ignore[attr-defined]
    return f"{header} {attributes}"
