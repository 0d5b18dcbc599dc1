# SPDX-License-Identifier: Apache-2.0
"""How long the daemon takes to put back what somebody else took away, by kind of drift and number of networks.

    python -m tools.bench.heal [--networks 100] [--rounds 5] [--backend ebpf|nft]

Needs root. Works in a network namespace of its own. Two times in ms, least and median of the rounds: from the
first event to the repair as the daemon says it (`heal_ms`), and from the start of the command that did the damage to
the daemon's word in its log, that command's own run time included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tools.bench.daemon import Daemon, DaemonError
from tools.bench.idle_daemon import make_devices, policy
from tools.lab.netns import Namespace, new_prefix, remove

_START_TIMEOUT_S: Final = 300
_HEAL_TIMEOUT_S: Final = 60
_POLL_S: Final = 0.002
_DETACH: Final = "from datapath.kernel.bpf import attachments as a; a.detach('d0')"

Act = Callable[[Namespace], object]


def _flap(node: Namespace) -> None:
    node.ip(["link set d0 down", "link set d0 up"])


def _replug(node: Namespace) -> None:
    node.ip(["link del d0", "link add d0 type veth peer name p0", "link set p0 up", "link set d0 up"])


def _rule(node: Namespace) -> None:
    rules = node.run("ip", "-4", "rule", "show").splitlines()
    line = next(line for line in rules if "lookup 70" in line)
    node.run(
        "ip", "-4", "rule", "del", "priority", line.partition(":")[0], *line.split("from all ")[1].split()[:2]
    )


def _route(node: Namespace) -> None:
    node.run("ip", "-4", "route", "flush", "table", "700001", "protocol", "78")


#: What is done, and a word that the daemon's report of the repair must have.
DRIFTS: Final[dict[str, tuple[str, Act]]] = {
    "nft flush ruleset": ("nft", lambda node: node.nft("flush ruleset")),
    "our table deleted": ("nft", lambda node: node.nft("delete table inet datapath")),
    "one ip rule deleted": ("rule", _rule),
    "our ip rules flushed": ("rule", lambda node: node.run("ip", "-4", "rule", "flush", "protocol", "78")),
    "routes of one network flushed": ("route", _route),
    "rp_filter turned on": ("set ", lambda node: node.sysctl({"net/ipv4/conf/d0/rp_filter": 1})),
    "device down and up": ("route", _flap),
    "device gone and back": ("route", _replug),
    "eBPF program detached (tcx: found at the next look)": (
        "eBPF",
        lambda node: node.run(sys.executable, "-c", _DETACH),
    ),
}


def _measure(daemon: Daemon, node: Namespace, word: str, act: Act) -> tuple[float, float] | None:
    """(as the daemon says, from outside) in ms, None where nothing was healed in time."""
    before, began = len(daemon.events("drift_healed")), time.monotonic()
    act(node)
    while time.monotonic() - began < _HEAL_TIMEOUT_S:
        new = daemon.events("drift_healed")[before:]
        found = [event for event in new if any(word in step for step in event["steps"])]
        if found:
            outside = (time.monotonic() - began) * 1000
            time.sleep(0.5)
            return max(event["heal_ms"] for event in found), outside
        time.sleep(_POLL_S)
    return None


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", choices=("ebpf", "nft"), default="ebpf")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    node, rows = Namespace(f"{new_prefix()}heal"), []
    with tempfile.TemporaryDirectory(prefix="datapath-bench-") as name:
        folder = Path(name)
        text = policy(arguments.networks).replace("backend: nft", f"backend: {arguments.backend}")
        (folder / "policy.yaml").write_text(text, encoding="utf-8")
        node.create()
        try:
            make_devices(node, arguments.networks)
            print(
                f"{arguments.networks} networks, both families, backend {arguments.backend}; ms, least / median"
            )
            with Daemon(node, folder / "policy.yaml", folder / "state", log=folder / "log") as daemon:
                daemon.wait_for("service_started", _START_TIMEOUT_S, poll_s=0.05)
                time.sleep(2)
                for what, (word, act) in DRIFTS.items():
                    if word == "eBPF" and arguments.backend != "ebpf":
                        continue
                    found = [_measure(daemon, node, word, act) for _ in range(arguments.rounds)]
                    times = [one for one in found if one is not None]
                    if len(times) < len(found):
                        print(f"{what:52} not healed in {len(found) - len(times)} of {len(found)}")
                        continue
                    said, outside = ([one[side] for one in times] for side in (0, 1))
                    rows.append({"drift": what, "heal_ms": said, "outside_ms": outside})
                    print(
                        f"{what:52} {min(said):7.1f} /{statistics.median(said):7.1f}   from the command on"
                        f" {min(outside):7.1f} /{statistics.median(outside):7.1f}",
                        flush=True,
                    )
        except DaemonError as error:
            raise SystemExit(str(error)) from error
        finally:
            remove(node.name)
    if arguments.json:
        arguments.json.write_text(json.dumps({"networks": arguments.networks, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
