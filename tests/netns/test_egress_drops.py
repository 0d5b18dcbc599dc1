# SPDX-License-Identifier: Apache-2.0
"""`datapath drops` and `egress`: what is not let out is shown as it happens, with its reason, beside what comes in."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from datapath.errors import ConflictError
from datapath.kernel.packet_log import PacketLog
from datapath.plan.egress import LOG_GROUP
from tests.netns.nodes import inside
from tests.service.daemon import wait_until
from tools.lab import Lab, command, network
from tools.lab.traffic import datagrams

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FAMILIES = (4, 6)
POD_A = '"10.112.1.2", "fd00:10:112:1::2"'
POD = {4: "10.112.1.2", 6: "fd00:10:112:1::2"}
VIPS = '["1.2.3.10", "2001:db8:100::10"]'
READERS = "/proc/net/netfilter/nfnetlink_log"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two networks; the first one's device has an address."""
    with Lab(networks=[network(0), network(1)], vlan_address=True) as built:
        yield built


@pytest.fixture
def state(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    command.teardown(lab, tmp_path)


def policy(lab: Lab, source_ip: str = VIPS, *, by: str = "public", backend: str = "ebpf") -> str:
    entry = f"  - name: web\n    network: {by}\n    source_ip: {source_ip}\n    sources: [{POD_A}]\n"
    return lab.policy(extra=f"backend: {backend}\negress:\n{entry}")


Found = list[dict[str, Any]]


@contextmanager
def watched(lab: Lab, state: Path) -> Iterator[Callable[[], Found]]:
    """`datapath drops` while it runs; what it has shown so far."""
    argv = [command.program(), "drops", "--json", "--follow", "--state-dir", str(state)]
    output = state / "drops"
    with output.open("w") as file:
        process = subprocess.Popen(lab.node.argv(*argv), stdout=file, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: _is_watched(lab) or process.poll() is not None, "it watches")
        yield lambda: [
            json.loads(line) for line in output.read_text().splitlines(keepends=True) if "\n" in line
        ]
    finally:
        process.kill()
        _, errors = process.communicate()
    assert errors == ""


def _is_watched(lab: Lab) -> bool:
    return any(line.split()[:1] == [str(LOG_GROUP)] for line in lab.node.run("cat", READERS).splitlines())


def send(lab: Lab, target: object, *, times: int = 1) -> None:
    with datagrams(lab, "pod_a", target, seconds=0.3) as sock:  # type: ignore[arg-type]
        for _ in range(times):
            sock.send(b"who")


def dropped(lab: Lab, name: str) -> int:
    listing = json.loads(lab.node.run("nft", "-j", "list", "counter", "inet", "datapath", f"egress.{name}"))
    return int(next(item["counter"]["packets"] for item in listing["nftables"] if "counter" in item))


@pytest.mark.parametrize("backend", ["ebpf", "nft"])
def test_what_is_not_let_out_is_shown_with_its_reason(lab: Lab, state: Path, backend: str) -> None:
    """A rule that is missing, and somebody who translates before us; for both families."""
    outside = lab.networks[0].client
    command.apply(lab, state, policy(lab, backend=backend))
    with watched(lab, state) as shown:
        for family in FAMILIES:
            send(lab, outside.get(family))
        for family in FAMILIES:
            lab.node.run("ip", f"-{family}", "rule", "flush", "protocol", "78")
            send(lab, outside.get(family))
        wait_until(lambda: len(shown()) >= 2, "both are shown")
        command.apply(lab, state, policy(lab, backend=backend))
        lab.node.nft(
            "table inet other { chain c { type nat hook postrouting priority 50;"
            f" ip saddr {POD[4]} udp dport 80 snat ip to 192.0.2.99; }}; }}"
        )
        try:
            send(lab, outside.v4)
            wait_until(lambda: len(shown()) >= 3, "the third is shown")
        finally:
            lab.node.nft("delete table inet other")
        found = shown()
    with inside(lab.node.name), PacketLog(LOG_GROUP) as log:
        tells_connections = log.tells_connections
    keys = ("reason", "device", "source", "translated_to")
    assert [tuple(item[key] for key in keys) for item in found] == [
        (reason, device, pod, carried) if tells_connections else (reason, device, carried, None)
        for reason, device, pod, carried in (
            ("wrong_device", "eth0", POD[4], "1.2.3.10"),
            ("wrong_device", "eth0", POD[6], "2001:db8:100::10"),
            ("untranslated", "eth0.100", POD[4], "192.0.2.99"),
        )
    ]
    for item, address in zip(found, (outside.v4, outside.v6, outside.v4), strict=True):
        assert (item["network"], item["egress"], item["direction"]) == ("public", None, "out")
        assert (item["destination"], item["protocol"]) == (str(address), 17)
        assert item["destination_port"] == 80
        assert item["source_port"] > 1024
    assert (dropped(lab, "public.wrong_device"), dropped(lab, "public.untranslated")) == (2, 1)


def test_an_entry_is_named(lab: Lab, state: Path) -> None:
    """`no_address` and `untracked` are of an entry; a raw socket's packet has no ports that anybody believes."""
    lab.node.ip(("addr del 1.2.4.9/24 dev eth0.200", "-6 addr del 2001:db8:200::9/64 dev eth0.200"))
    command.apply(lab, state, policy(lab, "network", by="public2"))
    outside = lab.networks[1].client
    with watched(lab, state) as shown:
        send(lab, outside.v4)
        wait_until(shown, "it is shown")
        lab.add_vlan_address(lab.networks[1])
        command.apply(lab, state, policy(lab, VIPS))
        lab.node.sysctl({"net/netfilter/nf_conntrack_tcp_loose": 0})
        try:
            with lab["pod_a"].socket(socket.AF_INET, socket.SOCK_RAW, 6) as raw:
                raw.sendto(
                    bytes([0, 7, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x04, 0, 0, 0, 0, 0, 0]),
                    (str(outside.v4), 0),
                )
            wait_until(lambda: len(shown()) >= 2, "both are shown")
        finally:
            lab.node.sysctl({"net/netfilter/nf_conntrack_tcp_loose": 1})
        found = shown()
    assert [(item["egress"], item["network"], item["reason"], item["protocol"]) for item in found] == [
        ("web", "public2", "no_address", 17),
        # Named by the policy that was in force when it began to watch.
        ("web", "public2", "untracked", 6),
    ]
    assert (found[1]["source_port"], found[1]["destination_port"]) == (7, 80)


def test_text_for_people_and_who_watches_second(lab: Lab, state: Path) -> None:
    command.apply(lab, state, policy(lab, backend="nft"))
    lab.node.run("ip", "-4", "rule", "flush", "protocol", "78")
    with watched(lab, state) as shown:
        second = command.datapath(lab, state, "drops")
        assert second.returncode == 1
        assert "somebody else reads log group" in second.stderr
        send(lab, lab.networks[0].client.v4)
        wait_until(shown, "the first is not disturbed")
    argv = lab.node.argv(command.program(), "drops", "--follow", "--state-dir", str(state))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        wait_until(lambda: _is_watched(lab), "it watches")
        send(lab, lab.networks[0].client.v4)
        line = process.stdout.readline()
        process.kill()
    assert re.search(
        r" public on eth0: egress wrong_device udp (10\.112\.1\.2:\d+ as )?1\.2\.3\.10(:\d+)? > ", line
    )
    assert line.endswith(f" > {lab.networks[0].client.v4}:80\n")


def test_a_flood_is_counted_and_sampled(lab: Lab, state: Path) -> None:
    """After a hundred in a second, the kernel copies nothing until the next one."""
    command.apply(lab, state, policy(lab))
    lab.node.run("ip", "-4", "rule", "flush", "protocol", "78")
    outside = lab.networks[0].client.v4
    with inside(lab.node.name), PacketLog(LOG_GROUP, per_second=10) as log:
        with pytest.raises(ConflictError):
            PacketLog(LOG_GROUP)
        began = time.monotonic()
        seen, paused = [], False
        for _ in range(10):
            send(lab, outside, times=50)
            seen += log.poll()
            paused |= not _is_watched(lab)
        assert paused
        seconds = 2 + int(time.monotonic() - began)
        assert 10 <= len(seen) <= 10 * seconds
        assert dropped(lab, "public.wrong_device") == 500

        def more() -> bool:
            send(lab, outside)
            return bool(log.poll())

        wait_until(more, "it is copied again")
    assert not _is_watched(lab)
