# SPDX-License-Identifier: Apache-2.0
"""Runs as root in the virtual machine, at the end of every boot: does to the node what nodes suffer, under traffic.

Only the standard library: it runs on a Debian without a checkout. Results are JSON lines on the second disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path("/dev/vdb")
STAGE = Path("/var/lib/datapath-check-stage")
POLICY = Path("/etc/datapath/policy.yaml")
VIPS = ("198.51.100.10", "2001:db8:1::10")
CLIENT = ("192.0.2.7", "2001:db8:99::7")
_INTERVAL_MS = 50
_PACKETS = 80
_lines: list[str] = []


def sh(*argv: str, check: bool = True) -> str:
    """Run a program; its output."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{argv}: {done.returncode} {done.stdout}{done.stderr}")
    return done.stdout.strip()


def report(check: str, *, good: bool, **figures: Any) -> None:
    """Keep a result, and write all of them: the machine may stop at any time."""
    _lines.append(json.dumps({"check": check, "good": good, **figures}))
    data = ("\n".join(_lines) + "\n").encode()
    with RESULTS.open("r+b") as disk:
        disk.seek(int(_stage()) * 65536)
        disk.write(data.ljust(65536, b"\0"))
        disk.flush()
        os.fsync(disk.fileno())
    print(_lines[-1], flush=True)


def _stage() -> str:
    return STAGE.read_text() if STAGE.exists() else "0"


def client() -> None:
    """A client two hops away, in a namespace: its packets come in on vip0, the node's default route is another."""
    sh("ip", "netns", "add", "client")
    sh("ip", "link", "set", "vip0-peer", "netns", "client")
    inside = ("ip", "-n", "client")
    sh(*inside, "link", "set", "lo", "up")
    sh(*inside, "link", "set", "vip0-peer", "up")
    mac = Path("/sys/class/net/vip0/address").read_text().strip()
    for gateway, address in zip(("198.51.100.1/24", "2001:db8:1::1/64"), CLIENT, strict=True):
        sh(*inside, "address", "add", gateway, "dev", "vip0-peer", "nodad")
        sh(*inside, "address", "add", address, "dev", "lo", "nodad")
    # Linux answers neighbour solicitations only on the device that has the address: MetalLB does it for VIPs.
    for vip in VIPS:
        sh(*inside, "neighbour", "replace", vip, "lladdr", mac, "dev", "vip0-peer", "nud", "permanent")


def losses(action: Callable[[], object]) -> dict[str, int]:
    """Echo requests of both families at a fixed rate while something happens; how many had no answer."""
    running = []
    for address, vip in zip(CLIENT, VIPS, strict=True):
        argv = ["ip", "netns", "exec", "client", "ping", "-n", "-I", address, "-W", "2"]
        argv += ["-i", str(_INTERVAL_MS / 1000), "-c", str(_PACKETS), vip]
        running.append(subprocess.Popen(argv, stdout=subprocess.PIPE, text=True))
    time.sleep(1.5)
    action()
    lost = {}
    for version, ping in zip(("ipv4", "ipv6"), running, strict=True):
        output = ping.communicate()[0]
        answered = {word for line in output.splitlines() for word in line.split() if "seq=" in word}
        lost[version] = _PACKETS - len(answered)
    return lost


def under_traffic(check: str, action: Callable[[], object], allowed: int = 0) -> None:
    """Report what an action costs in packets of 50 ms; up to `allowed` of each family are good."""
    before = main_pid()
    refused: list[str] = []

    def attempt() -> None:
        try:
            action()
        except RuntimeError as error:
            refused.append(str(error))

    lost = losses(attempt)
    time.sleep(1)
    healthy = "no drift" in sh("datapath", "status", check=False)
    report(
        check,
        good=max(lost.values()) <= allowed and healthy and not refused,
        lost=lost,
        refused=refused,
        sent_each=_PACKETS,
        interval_ms=_INTERVAL_MS,
        no_drift_afterwards=healthy,
        new_process=main_pid() != before,
    )


def main_pid() -> str:
    """Process of the daemon; 0 for none."""
    return sh("systemctl", "show", "-P", "MainPID", "datapath")


def boot_order() -> None:
    """Before the first device is configured, and before the network is said to be there."""

    def entered(unit: str) -> int:
        return int(sh("systemctl", "show", "-P", "ActiveEnterTimestampMonotonic", unit))

    times = {
        unit: entered(unit)
        for unit in (
            *("datapath-restore.service", "network-pre.target", "systemd-networkd.service"),
            *("datapath.service", "network-online.target"),
        )
    }
    good = 0 < times["datapath.service"] < times["network-online.target"]
    if _stage() != "0":
        good &= 0 < times["datapath-restore.service"] < times["systemd-networkd.service"]
    ms = {unit: value // 1000 for unit, value in times.items()}
    report("order at boot", good=good, ms_since_boot=ms)


def service() -> None:
    """Active, confined as the unit says, with the eBPF program."""
    status = sh("datapath", "status", check=False)
    report(
        "service after boot",
        good=sh("systemctl", "is-active", "datapath", check=False) == "active" and "no drift" in status,
        kernel=os.uname().release,
        systemd=sh("systemctl", "--version").splitlines()[0],
        status=status.splitlines(),
        tc=sh("tc", "filter", "show", "dev", "vip0", "ingress", check=False).splitlines()[:2],
        refused=sh(
            "journalctl",
            "-b",
            "-u",
            "datapath",
            "-u",
            "datapath-restore",
            "-g",
            "refused|denied",
            check=False,
        ),
        security=sh("systemd-analyze", "security", "--no-pager", "datapath", check=False).splitlines()[-1:],
    )


def first_boot() -> None:
    """Everything that happens to a node between two boots."""
    under_traffic("nothing happens", lambda: None)
    under_traffic("systemctl restart datapath", lambda: sh("systemctl", "restart", "datapath"))
    under_traffic("systemctl reload datapath", lambda: sh("systemctl", "reload", "datapath"))
    under_traffic("systemctl stop datapath", lambda: sh("systemctl", "stop", "datapath"))
    under_traffic("systemctl start datapath", lambda: sh("systemctl", "start", "datapath"))
    under_traffic("kill -9 of the daemon", lambda: sh("kill", "-9", main_pid()))
    time.sleep(5)
    under_traffic("networkctl reload", lambda: sh("networkctl", "reload"))
    under_traffic("restart of systemd-networkd", lambda: sh("systemctl", "restart", "systemd-networkd"))
    # Lost is what passes until it is repaired.
    under_traffic("nft flush ruleset", lambda: sh("nft", "flush", "ruleset"), allowed=10)
    under_traffic("ip rules deleted", lambda: sh("ip", "rule", "flush", "protocol", "78"), allowed=10)
    package = str(next(Path("/srv").glob("*-2_amd64.deb")))
    under_traffic("package upgrade", lambda: sh("dpkg", "-i", package))


def second_boot() -> None:
    """After a reboot with policy files that have gone bad."""
    under_traffic("reboot with a broken policy file", lambda: None)


def main() -> None:
    """One boot's share, then on to the next, or off."""
    stage = _stage()
    try:
        client()
        time.sleep(3)
        boot_order()
        service()
        first_boot() if stage == "0" else second_boot()
        if stage == "0":
            POLICY.write_text("version: 1\nnetworks: [")
            # As written by now: a machine that loses power has not more than this either.
            sh("sync")
    except Exception as error:  # noqa: BLE001  (whatever it is, the host must hear of it)
        journal = sh("journalctl", "-b", "-u", "datapath*", "--no-pager", "-n", "30", check=False)
        report("the check itself", good=False, error=repr(error), journal=journal.splitlines())
        stage = "1"
    if stage == "0":
        STAGE.write_text("1")
        sh("systemctl", "reboot", check=False)
    else:
        report("end", good=True)
        sh("systemctl", "poweroff", check=False)


if __name__ == "__main__":
    main()
