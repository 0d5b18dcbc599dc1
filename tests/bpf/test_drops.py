# SPDX-License-Identifier: Apache-2.0
"""Checked networks on a real device: what is dropped, counted, and seen by whoever watches."""

from __future__ import annotations

import os
import subprocess
import sys
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest

from datapath.errors import ConflictError, KernelError
from datapath.kernel import bpf
from datapath.plan.ingress import (
    IngressNetwork,
    IngressPoint,
    IngressProgram,
    SourceAction,
    SourceRule,
    Verdict,
    VlanProtocol,
)
from tests.bpf.packets import ETH_P_8021Q, ETH_P_IP, ETH_P_IPV6, frame, ipv4, ipv6

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.bpf.conftest import Wire

pytestmark = [pytest.mark.root, pytest.mark.bpf]

CHECKED = IngressNetwork(
    name="checked",
    slot=1,
    fwmark=0x100,
    point=IngressPoint("trunk0", VlanProtocol.DOT1Q, 100),
    device="trunk0",
    check_martians=True,
    check_sources=True,
)
PROGRAM = IngressProgram(
    0xFF00,
    (CHECKED,),
    common_sources=tuple(
        SourceRule(ip_network(text), SourceAction.DENY) for text in ("10.112.0.0/12", "fd00:10::/32")
    ),
)
TAG = ((ETH_P_8021Q, 100),)
GOOD = frame(ETH_P_IP, ipv4("192.0.2.1", "198.51.100.1"), TAG)
SPOOFED4 = frame(ETH_P_IP, ipv4("10.112.0.9", "198.51.100.1"), TAG)
SPOOFED6 = frame(ETH_P_IPV6, ipv6("fd00:10::9", "2001:db8::1"), TAG)
MARTIAN = frame(ETH_P_IP, ipv4("127.0.0.1", "198.51.100.1"), TAG)
BROKEN = frame(ETH_P_IP, ipv4("192.0.2.1", "198.51.100.1", version=5), TAG)


@pytest.fixture
def attached(wire: Wire) -> Iterator[int]:
    """Id of the program on the node's end of the wire."""
    del wire  # it only has to be there
    with bpf.load_ingress(PROGRAM) as loaded:
        bpf.attach(loaded, "trunk0")
        yield loaded.program_id


def test_drops_are_counted_by_reason_and_nothing_else_is_lost(wire: Wire, attached: int) -> None:
    for data, times in ((GOOD, 5), (SPOOFED4, 2), (SPOOFED6, 1), (MARTIAN, 4), (BROKEN, 3)):
        wire.send(data, times=times)
    counted = {verdict: counter.packets for verdict, counter in bpf.read_counters(attached)[1].items()}
    expected = {Verdict.PASS: 5, Verdict.SPOOFED: 3, Verdict.MARTIAN: 4, Verdict.MALFORMED: 3}
    assert counted == {verdict: expected.get(verdict, 0) for verdict in Verdict}


def test_sources_are_changed_in_place(wire: Wire, attached: int) -> None:
    wire.send(SPOOFED4)
    allowed = SourceRule(ip_network("10.112.0.0/24"), SourceAction.ALLOW)
    changed = IngressProgram(
        PROGRAM.fwmark_mask, (CHECKED,), common_sources=(*PROGRAM.common_sources, allowed)
    )
    state = bpf.observe_ingress()
    assert bpf.compare_ingress(PROGRAM, state).is_empty
    assert bpf.compare_ingress(changed, state).update == attached
    assert bpf.update_entries(attached, changed)
    assert bpf.compare_ingress(changed, bpf.observe_ingress()).is_empty
    wire.send(SPOOFED4)
    assert bpf.update_entries(attached, PROGRAM)
    wire.send(SPOOFED4)
    counters = bpf.read_counters(attached)[1]
    assert (counters[Verdict.SPOOFED].packets, counters[Verdict.PASS].packets) == (2, 1)


def test_reader_sees_what_is_dropped_while_it_reads(wire: Wire, attached: int) -> None:
    wire.send(SPOOFED4)  # before anybody watches: counted only
    with bpf.DropReader(attached) as reader:
        wire.send(GOOD)
        for data in (SPOOFED4, SPOOFED6, MARTIAN, BROKEN):
            wire.send(data)
        drops = reader.poll(5.0)
    assert [(drop.verdict, drop.source, drop.slot, drop.ifname) for drop in drops] == [
        (Verdict.SPOOFED, ip_address("10.112.0.9"), 1, "trunk0"),
        (Verdict.SPOOFED, ip_address("fd00:10::9"), 1, "trunk0"),
        (Verdict.MARTIAN, ip_address("127.0.0.1"), 1, "trunk0"),
        (Verdict.MALFORMED, None, 1, "trunk0"),
    ]
    assert (drops[1].destination, drops[1].protocol, drops[1].source_port, drops[1].destination_port) == (
        ip_address("2001:db8::1"),
        17,
        40000,
        53,
    )
    wire.send(SPOOFED4)  # after: nobody gets it later either
    with bpf.DropReader(attached) as reader:
        assert reader.poll(0) == []


def test_samples_are_limited_but_counters_are_not(wire: Wire, attached: int) -> None:
    with bpf.DropReader(attached, per_second=10) as reader:
        wire.send(SPOOFED4, times=500)
        samples = reader.poll(1.0)
    seconds = 1 + (samples[-1].time_ns - samples[0].time_ns) // 1_000_000_000
    assert 10 <= len(samples) <= 10 * seconds * (os.cpu_count() or 1)
    assert bpf.read_counters(attached)[1][Verdict.SPOOFED].packets == 500


def test_full_buffer_loses_samples_not_packets(wire: Wire, attached: int) -> None:
    with bpf.DropReader(attached, per_second=1_000_000) as reader:
        wire.send(SPOOFED4, times=3000)
        wire.send(GOOD, times=5)
        samples = reader.poll(0)
    assert 500 < len(samples) < 3000
    counters = bpf.read_counters(attached)[1]
    assert (counters[Verdict.SPOOFED].packets, counters[Verdict.PASS].packets) == (3000, 5)


def test_second_reader_is_refused_and_named(attached: int) -> None:
    holder = f"""
import sys
from datapath.kernel import bpf
with bpf.DropReader({attached}):
    print("reading", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "reading\n"
        with pytest.raises(ConflictError, match=str(other.pid)):
            bpf.DropReader(attached)
        other.communicate("")
    with bpf.DropReader(attached) as reader:
        assert reader.poll(0) == []


def test_a_program_that_is_gone(attached: int) -> None:
    with bpf.DropReader(attached) as reader:
        assert reader.poll(0.05) == []
    with pytest.raises(KernelError):
        bpf.DropReader(2**31 - 1)
