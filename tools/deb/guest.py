# SPDX-License-Identifier: Apache-2.0
"""Runs as root in the virtual machine, from early boot on: does to the node what nodes suffer, under traffic.

Three boots: the first ends with a reboot, the second with a power cut, the third with power off. Only the standard
library: it runs on a Debian without a checkout.
"""

from __future__ import annotations

import os
import time
import traceback
from pathlib import Path
from typing import Final

from tools.deb import topology
from tools.deb.node import events, is_as_desired, main_pid, sh, tell, wait_for_event, wait_until_active, write
from tools.deb.steps import FIRST_BOOT, SECOND_BOOT, THIRD_BOOT, Step
from tools.deb.topology import SITES
from tools.deb.traffic import GRACE_S, Client, EchoServer, Request, WrongWay, figures

_STAGE: Final = Path("/var/lib/datapath-check/stage")
_BOOT_S: Final = 240.0
_SETTLE_S: Final = 2.0
#: How much later than network-online.target, so than kubelet, a flow may get its first answer: neighbours are not
#: known yet, and requests come every quarter of a second.
_ONLINE_S: Final = 2.0


class Traffic:
    """The clients, what they ask, and a watch on the uplink."""

    def __init__(self) -> None:
        vips = [vip for site in SITES for vip in (*site.node_vips, *site.pod_vips)]
        self._wrong_way = WrongWay(topology.UPLINK, frozenset(vips))
        self._wrong_way.start()
        EchoServer("pod", list(topology.POD), topology.ECHO_PORT)
        EchoServer(None, [vip for site in SITES for vip in site.node_vips], topology.ECHO_PORT)
        self._clients: list[Client] = []

    def begin(self, site: topology.Site) -> None:
        """From now on this client asks."""
        targets = [
            (f"{site.name} {family} {kind}", own, vip)
            for kind, vips in (("node", site.node_vips), ("pod", site.pod_vips))
            for family, own, vip in zip(("IPv4", "IPv6"), site.clients, vips, strict=True)
        ]
        self._clients.append(Client(site.name, targets, topology.ECHO_PORT))

    def requests(self, begin_s: float, end_s: float) -> list[Request]:
        """Those that were sent between two moments of the monotonic clock."""
        return [
            request
            for client in self._clients
            for request in list(client.requests)
            if begin_s <= request.sent_s < end_s
        ]

    def settled(self, begin_s: float, end_s: float) -> list[Request]:
        """The same, when their answers have had the time to come."""
        while time.monotonic() < end_s + GRACE_S:
            requests = self.requests(begin_s, end_s)
            if all(request.answered_s is not None for request in requests):
                break
            time.sleep(0.2)
        return self.requests(begin_s, end_s)

    def astray(self, begin_s: float, end_s: float, *sites: topology.Site) -> list[float]:
        """When answers left by the uplink, those of some networks only."""
        vips = {vip for site in sites or SITES for vip in (*site.node_vips, *site.pod_vips)}
        return [at for at, vip in list(self._wrong_way.seen) if begin_s <= at < end_s and vip in vips]


def _namespace(name: str) -> tuple[str, ...]:
    sh("ip", "netns", "add", name)
    inside = ("ip", "-n", name)
    sh(*inside, "link", "set", "lo", "up")
    return inside


def _make_pod() -> None:
    inside = _namespace("pod")
    sh("ip", "link", "add", "pod0", "type", "veth", "peer", "name", "eth0", "netns", "pod")
    sh(*inside, "link", "set", "eth0", "up")
    sh("ip", "link", "set", "pod0", "up")
    for address, gateway in zip(topology.POD, topology.POD_GATEWAY, strict=True):
        bits = 64 if ":" in address else 24
        sh("ip", "address", "add", f"{gateway}/{bits}", "dev", "pod0", "nodad")
        sh(*inside, "address", "add", f"{address}/{bits}", "dev", "eth0", "nodad")
        sh(*inside, "route", "add", "default", "via", gateway)


def _make_client(site: topology.Site) -> None:
    """A client behind the router of its network."""
    inside = _namespace(site.name)
    sh("ip", "link", "set", site.port, "netns", site.name)
    sh(*inside, "link", "set", site.port, "up")
    device = site.port
    if site.vlan:
        device = "vlan"
        tag = ("type", "vlan", "id", str(site.vlan))
        sh(*inside, "link", "add", "link", site.port, "name", device, *tag)
        sh(*inside, "link", "set", device, "up")
    for gateway, own in zip(site.gateways, site.clients, strict=True):
        sh(*inside, "address", "add", f"{gateway}/{64 if ':' in gateway else 24}", "dev", device, "nodad")
        sh(*inside, "address", "add", own, "dev", "lo", "nodad")
    # Linux answers neighbour solicitations only on the device that has the address: MetalLB does it for VIPs.
    for vip in (*site.node_vips, *site.pod_vips):
        sh(*inside, "neighbour", "replace", vip, "lladdr", site.mac, "dev", device, "nud", "permanent")


def _begin_traffic() -> Traffic:
    """Each client begins as soon as its cable is there."""
    _make_pod()
    traffic = Traffic()
    for site in SITES:
        deadline = time.monotonic() + _BOOT_S
        while not Path("/sys/class/net", site.port).exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"there is no {site.port}")
            time.sleep(0.005)
        _make_client(site)
        traffic.begin(site)
    return traffic


def _property(name: str, unit: str) -> str:
    return sh("systemctl", "show", "-P", name, unit)


def _boot_order(*, restored: bool) -> None:
    """Restored before the first device is configured; the daemon before the network is said to be there."""
    units = ("datapath-restore", "systemd-networkd", "datapath", "network-online.target")
    ms = {unit: int(_property("ActiveEnterTimestampMonotonic", unit)) // 1000 for unit in units}
    good = 0 < ms["datapath"] < ms["network-online.target"]
    if restored:
        good = good and 0 < ms["datapath-restore"] < ms["systemd-networkd"]
    tell(check="order at boot", good=good, ms_since_boot=ms)


def _service() -> None:
    """Confined as the unit says, with the eBPF program, and nothing was refused to it."""
    units = ("-u", "datapath", "-u", "datapath-restore")
    refused = sh("journalctl", "-b", *units, "-g", "refused|denied", "-o", "cat", "-q", check=False)
    status = sh("datapath", "status", check=False).splitlines()
    filters = {
        site.device: sh("tc", "filter", "show", "dev", site.device, "ingress", check=False).splitlines()
        for site in SITES
    }
    tell(
        check="the service",
        good=not refused and all(any("bpf" in line for line in lines) for lines in filters.values()),
        kernel=os.uname().release,
        systemd=sh("systemctl", "--version").splitlines()[0],
        status=status,
        refused=refused.splitlines(),
        security=sh("systemd-analyze", "security", "--no-pager", "datapath", check=False).splitlines()[-1:],
    )


def _boot(name: str, traffic: Traffic, began_s: float, *, restored: bool) -> None:
    """What the clients saw of a boot: when each flow was answered first, and that it was answered from then on."""
    print(f"{name}: traffic flows", flush=True)
    is_up = wait_until_active("multi-user.target", "network-online.target", "datapath", timeout_s=_BOOT_S)
    time.sleep(_SETTLE_S)
    healthy = is_as_desired()
    end_s = time.monotonic()
    everything = traffic.settled(began_s, end_s)
    online_s = int(_property("ActiveEnterTimestampMonotonic", "network-online.target")) / 1e6
    for site in SITES:
        requests = [item for item in everything if item.flow.startswith(site.name)]
        astray = traffic.astray(began_s, end_s, site)
        first: dict[str, float] = {}
        for item in requests:
            if item.answered_s is not None:
                first.setdefault(item.flow, item.sent_s)
        served = [item for item in requests if item.sent_s >= first.get(item.flow, end_s)]
        seen = figures(served)
        late_s = max(first.values(), default=end_s) - online_s
        good = is_up and healthy and len(first) == len({item.flow for item in requests})
        tell(
            step=f"{name}: {site.name}",
            good=good and seen["lost"] == 0 and late_s <= _ONLINE_S,
            limit=f"answered {_ONLINE_S:.0f} s after network-online.target, then 0 lost",
            **seen,
            wrong_way=len(astray),
            asked_from_ms=round(1000 * requests[0].sent_s) if requests else None,
            answered_from_ms={flow: round(1000 * at) for flow, at in first.items()},
            after_online_ms=round(1000 * late_s),
            wrong_way_for_ms=round(1000 * (astray[-1] - astray[0])) if astray else 0,
        )
    _boot_order(restored=restored)
    _service()


def _take(step: Step, traffic: Traffic) -> None:
    """Do it, wait until all is as desired, and tell what it cost."""
    print(step.name, flush=True)
    pid, wall, begin_s = main_pid(), time.time(), time.monotonic()
    refused = ""
    try:
        step.action()
    except Exception as error:  # noqa: BLE001  (whatever it is, it is this step's result)
        refused = str(error)
    took_s = time.monotonic() - begin_s
    wait_for_event(step.event, wall)
    time.sleep(_SETTLE_S)
    healthy = is_as_desired()
    end_s = time.monotonic()
    seen = figures(traffic.settled(begin_s, end_s))
    log = events(wall)
    repairs = [event for event in log if event.get("event") == "drift_healed"]
    names = {str(event.get("event")) for event in log}
    wrong_way = len(traffic.astray(begin_s, end_s))
    problems = [refused] if refused else []
    repaired = [text for event in repairs for text in event["steps"]]
    problems += step.problems(seen, repaired=repaired, events=names, healthy=healthy, wrong_way=wrong_way)
    tell(
        step=step.name,
        good=not problems,
        problems=problems,
        limit=step.limit,
        **seen,
        wrong_way=wrong_way,
        repairs=len(repairs),
        repair_ms=max((event["heal_ms"] for event in repairs), default=None),
        repaired=[{key: event.get(key) for key in ("steps", "by", "seen", "heal_ms")} for event in repairs][
            :6
        ],
        took_ms=round(1000 * took_s),
        new_process=main_pid() != pid,
    )


def _run(stage: int) -> None:
    began_s = time.monotonic()
    traffic = _begin_traffic()
    name = ("first boot", "reboot", "power cut, broken policy file")[stage]
    _boot(name, traffic, began_s, restored=stage > 0)
    if stage == 2:
        rejected = any(event.get("event") == "policy_rejected" for event in events(0))
        tell(check="the broken policy file was rejected", good=rejected)
    for step in (FIRST_BOOT, SECOND_BOOT, THIRD_BOOT)[stage]:
        _take(step, traffic)


def main() -> None:
    """One boot's share, then on to the next, or off."""
    stage = int(_STAGE.read_text()) if _STAGE.exists() else 0
    try:
        _run(stage)
    except Exception:  # noqa: BLE001  (whatever it is, the host must hear of it)
        journal = sh("journalctl", "-b", "-u", "datapath*", "--no-pager", "-n", "30", check=False)
        tell(check="the guest itself", good=False, error=traceback.format_exc(), journal=journal.splitlines())
        sh("systemctl", "poweroff", "-ff", check=False)
    write(_STAGE, str(stage + 1))
    if stage == 0:
        sh("systemctl", "reboot", check=False)
    elif stage == 1:
        sh("systemctl", "reboot", "-ff", check=False)
    else:
        tell(check="end", good=True)
        sh("systemctl", "poweroff", "-ff", check=False)


if __name__ == "__main__":
    main()
