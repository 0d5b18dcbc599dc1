# SPDX-License-Identifier: Apache-2.0
"""A daemon under test: a process of its own in a namespace of its own, ended by its pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tools.lab.dump import tcx_programs
from tools.lab.netns import LabError, Namespace, new_prefix, remove
from tools.lab.patience import PATIENCE

#: A guard against hanging, not a measure: ten daemons at once on a busy machine take 20 s for what takes one 2 s.
PATIENCE_S = 60.0 * PATIENCE
DEVICES = ("eth0", "eth1")


def network(name: str, device: str, number: int) -> str:
    """One network of a policy, both families."""
    return (
        f"  - name: {name}\n    interface: {device}\n"
        f"    vips: [203.0.{number}.0/24, '2001:db8:{number}::/64']\n"
        f"    gateway: [203.0.{number}.1, '2001:db8:{number}::1']\n"
    )


def policy(*networks: str, backend: str = "nft") -> str:
    """A policy of these networks."""
    head = f"version: 1\nbackend: {backend}\nnode: {{internal: [10.112.0.0/12, 'fd00:10:112::/48']}}\n"
    return head + "networks:\n" + "".join(networks)


FIRST = network("first", "eth0", 113)
SECOND = network("second", "eth1", 114)


def wait_until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    """Poll until the condition gives something true, and return that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


class Node:
    """A namespace with two devices, a policy file and a state directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = folder / "policy.yaml"
        self.state = folder / "state"
        self.ns = Namespace(f"{new_prefix()}svc")
        self.ns.create()
        for device in DEVICES:
            self.add_device(device)
        self.ns.settle()

    def add_device(self, name: str) -> None:
        self.ns.ip(
            [f"link add {name} type veth peer name p-{name}", f"link set p-{name} up", f"link set {name} up"]
        )

    def replug_device(self, name: str) -> None:
        """It is gone and comes back, with another ifindex."""
        self.ns.run("ip", "link", "del", name)
        self.add_device(name)

    def delete_rule(self, family: int) -> None:
        """Delete the first of our ip rules."""
        rules = self.ns.run("ip", f"-{family}", "rule", "show").splitlines()
        line = next(line for line in rules if "lookup 7000" in line)
        self.ns.run("ip", f"-{family}", "rule", "del", "priority", line.partition(":")[0])

    def close(self) -> None:
        remove(self.ns.name)

    def datapath(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "datapath", verb, *arguments, "--state-dir", str(self.state)]
        return subprocess.run(self.ns.argv(*argv), capture_output=True, text=True, check=False)

    def snapshot(self) -> dict[str, str]:
        """All of ours, as the kernel's own tools show it; without handles and counts."""
        run = self.ns.run
        return {
            "table": "\n".join(
                line
                for line in run("nft", "-s", "list", "ruleset").splitlines()
                if "counter packets" not in line
            ),
            # Sorted: among rules of one priority the order says nothing, each compares another mark.
            "rules": "\n".join(
                sorted((run("ip", "-4", "rule", "show") + run("ip", "-6", "rule", "show")).splitlines())
            ),
            "routes": "\n".join(
                sorted(
                    (
                        run("ip", "-4", "route", "show", "table", "all", "proto", "78")
                        + run("ip", "-6", "route", "show", "table", "all", "proto", "78")
                    ).splitlines()
                )
            ),
            "rp_filter": " ".join(self.ns.read_sysctl(f"net/ipv4/conf/{name}/rp_filter") for name in DEVICES),
            "filters": "".join(run("tc", "filter", "show", "dev", name, "ingress") for name in DEVICES),
            "tcx": "".join(sorted(self.ns.call(tcx_programs).splitlines(keepends=True))),
        }

    def has(self, snapshot: dict[str, str]) -> bool:
        """Whether all is as it was; False, too, while a device is missing."""
        try:
            return self.snapshot() == snapshot
        except (OSError, LabError):
            return False


class Daemon:
    """`datapath run` as a process. A context manager."""

    def __init__(self, node: Node, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.node = node
        self.log_path = node.folder / f"log-{time.monotonic_ns()}"
        argv = [sys.executable, "-m", "datapath", "run", str(node.policy), "--state-dir", str(node.state)]
        clean = {
            key: value for key, value in os.environ.items() if key not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")
        }
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                node.ns.argv(*argv, *arguments), stdout=log, stderr=log, env={**clean, **(environment or {})}
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(PATIENCE_S)

    def started(self) -> Daemon:
        self.wait_for("service_started")
        return self

    def events(self, name: str) -> list[dict[str, Any]]:
        """Log lines of that event, in order."""
        found = []
        for line in self.log_path.read_text().splitlines():
            try:
                document = json.loads(line[line.index("{") :])
            except ValueError:
                continue
            if document.get("event") == name:
                found.append(document)
        return found

    def wait_for(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait until an event was logged so many times; the last one."""

        def found() -> list[dict[str, Any]] | None:
            events = self.events(name)
            if len(events) < count and self.process.poll() is not None:
                raise AssertionError(f"the daemon ended: {self.log_path.read_text()}")
            return events if len(events) >= count else None

        try:
            events: list[dict[str, Any]] = wait_until(found, f"{count} x {name}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log_path.read_text()}") from error
        return events[count - 1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)
