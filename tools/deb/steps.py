# SPDX-License-Identifier: Apache-2.0
"""What is done to the node, and what it may cost. Runs in the virtual machine: only the standard library."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tools.deb.node import main_pid, sh, wait_until_active, write
from tools.deb.topology import SITES, policy

#: Until the daemon has repaired what somebody removed, seen by the client. Emulation makes everything ten to thirty
#: times slower; on hardware it is below 100 ms.
REPAIRED_MS: Final = 3000
_POLICY: Final = Path("/etc/datapath/policy.yaml")
_DROP_IN: Final = Path("/etc/systemd/networkd.conf.d/50-datapath.conf")
#: How the daemon calls the repair of the eBPF program.
_PROGRAM: Final = "eBPF program"
_DAEMON_S: Final = 60.0
#: Of datapath/plan/rtnl.py, which is not installed for this interpreter.
PROTOCOL: Final = "78"


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happens to a node.

    Attributes:
        name: as a person would say it.
        action: may raise ProgramError.
        breaks: whether it takes away something of ours: then the daemon must have repaired it, within REPAIRED_MS;
            otherwise not one packet may be lost, nor anything be repaired but the eBPF program: its list of the node's
            own addresses follows these, and systemd-networkd takes some away and gives them again when it starts.
        event: that the daemon must have logged, to show that the step happened at all.
    """

    name: str
    action: Callable[[], object]
    breaks: bool = False
    event: str = ""

    @property
    def limit(self) -> str:
        return f"repaired, at most {REPAIRED_MS} ms" if self.breaks else "0 lost"

    def problems(
        self,
        seen: Mapping[str, int],
        *,
        repaired: Collection[str],
        events: set[str],
        healthy: bool,
        wrong_way: int,
    ) -> list[str]:
        """What is not as it must be; empty where all is well."""
        found = []
        if not seen["sent"]:
            found.append("nothing was sent")
        if self.breaks:
            if not repaired:
                found.append("nothing was repaired")
            if seen["outage_ms"] > REPAIRED_MS:
                found.append(f"{seen['outage_ms']} ms without answers")
        else:
            if any(not step.startswith(_PROGRAM) for step in repaired):
                found.append("the daemon had to repair something")
            if seen["lost"] or wrong_way:
                found.append("packets were lost")
        if seen["stuck"]:
            found.append("connections begun meanwhile stayed broken")
        if self.event and self.event not in events:
            found.append(f"no {self.event} in the log")
        if not healthy:
            found.append("datapath status shows drift")
        return found


def _kill() -> None:
    """And wait until the service manager has started it again."""
    before = main_pid()
    sh("kill", "-9", before)
    deadline = time.monotonic() + _DAEMON_S
    while main_pid() in (before, "0"):
        if time.monotonic() > deadline:
            raise TimeoutError("the daemon was not started again")
        time.sleep(0.2)
    if not wait_until_active("datapath", timeout_s=_DAEMON_S):
        raise TimeoutError("the daemon did not get ready again")


def _upgrade() -> None:
    package = next(Path("/srv").glob("*-2_amd64.deb"))
    sh("dpkg", "-i", str(package))
    version = package.name.split("_")[1]
    installed = sh("dpkg-query", "-W", "-f", "${Version} ${db:Status-Abbrev}", "datapath")
    if installed.split() != [version, "ii"]:
        raise ValueError(f"{installed} is installed, not {version}")


def _networkd_without_drop_in() -> None:
    """As docs/operating.md says: an empty file of the same name."""
    write(_DROP_IN, "")
    sh("systemctl", "restart", "systemd-networkd")


def _networkd_with_drop_in() -> None:
    _DROP_IN.unlink()
    sh("systemctl", "restart", "systemd-networkd")


def _both_families(*arguments: str) -> None:
    sh("ip", "-4", *arguments)
    sh("ip", "-6", *arguments)


def _delete_rules() -> None:
    _both_families("rule", "flush", "protocol", PROTOCOL)


def _delete_routes() -> None:
    _both_families("route", "flush", "table", "all", "proto", PROTOCOL)


def _delete_qdiscs() -> None:
    for site in SITES:
        sh("tc", "qdisc", "del", "dev", site.device, "clsact")


FIRST_BOOT: Final = (
    Step("nothing happens", lambda: time.sleep(5)),
    Step("systemctl reload datapath", lambda: sh("systemctl", "reload", "datapath"), event="policy_in_force"),
    Step(
        "systemctl restart datapath", lambda: sh("systemctl", "restart", "datapath"), event="service_started"
    ),
    Step("systemctl stop datapath", lambda: sh("systemctl", "stop", "datapath"), event="service_stopped"),
    Step("systemctl start datapath", lambda: sh("systemctl", "start", "datapath"), event="service_started"),
    Step("kill -9 of the daemon", _kill, event="service_started"),
    Step("networkctl reload", lambda: sh("networkctl", "reload")),
    Step("restart of systemd-networkd", lambda: sh("systemctl", "restart", "systemd-networkd")),
    Step("the same without our drop-in", _networkd_without_drop_in, breaks=True),
    Step("drop-in back, networkd restarted", _networkd_with_drop_in),
    # `flush ruleset`, then the services of the node, in one transaction.
    Step("nft flush ruleset", lambda: sh("systemctl", "reload", "nftables"), breaks=True),
    Step("our ip rules deleted", _delete_rules, breaks=True),
    Step(
        "our routes deleted",
        _delete_routes,
        breaks=True,
    ),
    Step("clsact qdiscs deleted", _delete_qdiscs, breaks=True),
    Step("package upgrade", _upgrade, event="service_started"),
)
SECOND_BOOT: Final = (
    Step("policy file broken", lambda: write(_POLICY, "version: 1\nnetworks: ["), event="policy_rejected"),
)
THIRD_BOOT: Final = (Step("policy file mended", lambda: write(_POLICY, policy()), event="policy_in_force"),)
