# SPDX-License-Identifier: Apache-2.0
"""Memory and CPU of an idle daemon, and its growth over many reconciles.

    python -m tools.bench.idle_daemon [--networks 100] [--seconds 330] [--reconciles 10000]

Needs root. Works in a network namespace of its own. The default time covers every timer of the daemon at least
once. Prints figures; the targets (60 MB, 0.1 % of a CPU, no growth) are the reader's to compare.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.bench.daemon import Daemon, DaemonError
from tools.lab.netns import Namespace, new_prefix, remove

_START_TIMEOUT_S = 120
_REPORTS = 10


def policy(networks: int) -> str:
    """A policy of so many networks on devices d0, d1, ..., both families."""
    lines = ["version: 1", "backend: ebpf", "node: {internal: [10.112.0.0/12]}", "networks:"]
    for number in range(networks):
        high, low = divmod(number, 256)
        v4, v6 = f"203.{low}.{high}", f"2001:db8:{number:x}:"
        lines.append(
            f"  - {{name: n{number}, interface: d{number}, vips: [{v4}.0/24, '{v6}:/64'],"
            f" gateway: [{v4}.1, '{v6}:1']}}"
        )
    return "\n".join(lines) + "\n"


def make_devices(namespace: Namespace, count: int) -> None:
    """Create d0, d1, ..., up."""
    namespace.ip([f"link add d{number} type veth peer name p{number}" for number in range(count)])
    namespace.ip([f"link set {side}{number} up" for number in range(count) for side in "pd"])


def rss_kb(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    return 0


def _idle(namespace: Namespace, folder: Path, seconds: float) -> None:
    policy_file, metrics = folder / "policy.yaml", f"unix:{folder}/metrics.sock"
    with Daemon(namespace, policy_file, folder / "state", "--metrics", metrics, log=folder / "log") as daemon:
        daemon.wait_for("service_started", _START_TIMEOUT_S, poll_s=0.1)
        daemon.rest()
        print(f"after the start     RSS {rss_kb(daemon.pid) / 1024:6.1f} MB")
        before, began = daemon.cpu_s, time.monotonic()
        time.sleep(seconds)
        share = (daemon.cpu_s - before) / (time.monotonic() - began)
        print(f"idle for {seconds:6.0f} s     RSS {rss_kb(daemon.pid) / 1024:6.1f} MB, CPU {share:.3%}")


def _reconcile(state: Path, count: int) -> None:
    """In the namespace: look again and again, believing nothing, as the daemon does after lost events."""
    from datapath import log  # noqa: PLC0415  (only the child needs the product)
    from datapath.service.healer import Healer  # noqa: PLC0415
    from datapath.state import StateDirectory  # noqa: PLC0415

    log.configure()
    healer = Healer(StateDirectory(state))
    for number in range(count + 1):
        healer.forget("*")
        look = healer.look()
        if look.done or look.failed:
            raise SystemExit(f"something drifted: {look.done} {look.failed}")
        if number % max(1, count // _REPORTS) == 0:
            print(
                f"reconciles {number:8}  RSS {rss_kb(os.getpid()) / 1024:6.1f} MB, "
                f"CPU {time.process_time():.1f} s",
                flush=True,
            )
    healer.close()


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=330)
    parser.add_argument("--reconciles", type=int, default=10_000)
    parser.add_argument("--reconcile-in", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reconcile_in:
        _reconcile(arguments.reconcile_in, arguments.reconciles)
        return 0
    namespace = Namespace(f"{new_prefix()}idle")
    with tempfile.TemporaryDirectory(prefix="datapath-bench-") as name:
        folder = Path(name)
        (folder / "policy.yaml").write_text(policy(arguments.networks), encoding="utf-8")
        namespace.create()
        try:
            make_devices(namespace, arguments.networks)
            print(f"{arguments.networks} networks, both families")
            _idle(namespace, folder, arguments.seconds)
            if arguments.reconciles:
                argv = [
                    sys.executable,
                    "-m",
                    "tools.bench.idle_daemon",
                    "--reconcile-in",
                    str(folder / "state"),
                ]
                argv += ["--reconciles", str(arguments.reconciles)]
                subprocess.run(namespace.argv(*argv), check=True)
        except DaemonError as error:
            raise SystemExit(str(error)) from error
        finally:
            remove(namespace.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
