# SPDX-License-Identifier: Apache-2.0
"""The lab itself: it leaves nothing behind, and its dump sees every kind of change."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.lab import Lab
from tools.lab.dump import difference, dump_namespace

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
#: Who starts this in the background of a shell has it ignore SIGINT.
HOLD = """
import signal, sys
from tools.lab import Lab
signal.signal(signal.SIGINT, signal.default_int_handler)
with Lab() as lab:
    print(lab.prefix, flush=True)
    sys.stdin.read()
"""


def namespaces(prefix: str) -> list[str]:
    return [path.name for path in Path("/var/run/netns").glob(f"{prefix}*")]


def held_lab() -> tuple[subprocess.Popen[str], str]:
    """Start a process that holds a lab; return it and the lab's prefix."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str], number: int) -> int:
    process.send_signal(number)
    process.communicate(timeout=30)
    return process.returncode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_lab_whose_process_is_told_to_end_removes_its_namespaces(number: int) -> None:
    process, prefix = held_lab()
    assert len(namespaces(prefix)) == 10

    assert end(process, number) != 0
    assert namespaces(prefix) == []


def test_clean_removes_the_labs_of_dead_processes_only() -> None:
    with Lab() as alive:
        process, prefix = held_lab()
        end(process, signal.SIGKILL)
        assert len(namespaces(prefix)) == 10

        subprocess.run(
            [sys.executable, "-m", "tools.lab", "clean"], check=True, cwd=ROOT, capture_output=True
        )
        assert namespaces(prefix) == []
        assert len(namespaces(alive.prefix)) == 10


def test_the_dump_of_an_untouched_node_stays_the_same(lab: Lab) -> None:
    assert difference(dump_namespace(lab.node), dump_namespace(lab.node)) == ""


@pytest.mark.parametrize(
    ("section", "do", "undo"),
    [
        ("rules4", "ip -4 rule add pref 5 lookup main", "ip -4 rule del pref 5"),
        ("rules6", "ip -6 rule add pref 5 lookup main", "ip -6 rule del pref 5"),
        ("routes4", "ip -4 route add 192.0.2.0/24 dev eth0 table 77", "ip -4 route flush table 77"),
        ("routes6", "ip -6 route add 2001:db8:77::/64 dev eth0 table 77", "ip -6 route flush table 77"),
        ("links", "ip link add br77 type bridge", "ip link del br77"),
        ("links", "ip addr add 192.0.2.1/32 dev lo", "ip addr del 192.0.2.1/32 dev lo"),
        ("qdiscs", "tc qdisc add dev eth0 clsact", "tc qdisc del dev eth0 clsact"),
        ("nft", "nft add table inet seventyseven", "nft delete table inet seventyseven"),
        ("iptables", "iptables-legacy -A INPUT -j ACCEPT", "iptables-legacy -F INPUT"),
        ("sysctls", "sysctl -q net.ipv4.conf.eth0.rp_filter=2", "sysctl -q net.ipv4.conf.eth0.rp_filter=0"),
        (
            "sysctls",
            "sysctl -q net.ipv6.conf.default.hop_limit=7",
            "sysctl -q net.ipv6.conf.default.hop_limit=64",
        ),
    ],
)
def test_the_dump_sees_a_change(lab: Lab, section: str, do: str, undo: str) -> None:
    before = dump_namespace(lab.node)
    lab.node.run(*do.split())
    after = dump_namespace(lab.node)
    lab.node.run(*undo.split())

    assert before[section] != after[section]
    assert difference(before, after) != ""
