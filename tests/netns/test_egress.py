# SPDX-License-Identifier: Apache-2.0
"""`egress`: connections that are opened from inside leave by their network, with its address, or not at all."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.leaving import captured, connect
from tools.lab import Backend, Lab, command, network
from tools.lab import topology as topo
from tools.lab.dump import difference, dump_namespace
from tools.lab.traffic import ask_line, datagrams

pytestmark = [pytest.mark.root, pytest.mark.bpf]

FAMILIES = (4, 6)
VIP = {4: "1.2.3.10", 6: "2001:db8:100::10"}
OWN = {4: "1.2.3.9", 6: "2001:db8:100::9"}
POOL = {4: {f"1.2.3.{n}" for n in (40, 41, 42)}, 6: {f"2001:db8:100::{n}" for n in (40, 41, 42)}}
NODE_OUT = {4: str(topo.NODE.v4), 6: str(topo.NODE.v6)}
SOURCES = {
    "vip": ('["1.2.3.10", "2001:db8:100::10"]', {f: {VIP[f]} for f in FAMILIES}),
    "network": ("network", {f: {OWN[f]} for f in FAMILIES}),
    "pool": ('["1.2.3.40-1.2.3.42", "2001:db8:100::40-2001:db8:100::42"]', POOL),
}


def entry(name: str, source_ip: str, sources: str = "", *, extra: str = "", by: str = "public") -> str:
    text = f"  - name: {name}\n    network: {by}\n    source_ip: {source_ip}\n"
    if sources:
        text += f"    sources: [{sources}]\n"
    return text + extra


POD_A = '"10.112.1.2", "fd00:10:112:1::2"'
POD_B = '"10.112.1.3", "fd00:10:112:1::3"'
NODE = '"192.168.1.10", "2001:db8:1::10"'
SET = "    set: true\n"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Two networks, whose outside clients serve; the first one's device has an address."""
    with Lab(networks=[network(0), network(1)], vlan_address=True) as built:
        for net in built.networks:
            built.serve(net.role("client"), net.client)
        pool = [*topo.pair("1.2.3.40", "2001:db8:100::40"), *topo.pair("1.2.3.41", "2001:db8:100::41")]
        built.announce(built.networks[0], [*pool, *topo.pair("1.2.3.42", "2001:db8:100::42")])
        yield built


@pytest.fixture
def state(lab: Lab, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    # What is still to be closed would leave by another way once the policy is gone, and be counted by another test.
    lab.hang_up()
    command.teardown(lab, tmp_path)


def policy(lab: Lab, *entries: str) -> str:
    return lab.policy(extra="egress:\n" + "".join(entries) if entries else "")


def egress(lab: Lab, state: Path, *arguments: str, status: int = 0) -> str:
    done = command.datapath(lab, state, "egress", *arguments)
    assert done.returncode == status, done.stderr + done.stdout
    return done.stdout if status == 0 else done.stderr


def counters(lab: Lab) -> dict[str, int]:
    listing = json.loads(lab.node.run("nft", "-j", "list", "counters", "table", "inet", "datapath"))
    return {
        item["counter"]["name"].removeprefix("egress."): item["counter"]["packets"]
        for item in listing["nftables"]
        if "counter" in item
    }


def tcp_source(lab: Lab, role: str, target: object, port: int = topo.SERVICE_PORT) -> str:
    with connect(lab, role, target, port=port) as sock:
        return str(json.loads(ask_line(sock, "who"))["source"])


def udp_source(lab: Lab, role: str, target: object, port: int = topo.SERVICE_PORT) -> str:
    with datagrams(lab, role, target, port=port) as sock:  # type: ignore[arg-type]
        sock.send(b"who")
        return str(json.loads(sock.recv(200))["source"])


@pytest.mark.parametrize("backend", ["ebpf", "nft"])
@pytest.mark.parametrize("kind", SOURCES)
def test_pods_and_the_node_leave_by_the_network_with_its_address(
    lab: Lab, state: Path, kind: str, backend: str
) -> None:
    source_ip, expected = SOURCES[kind]
    outside = lab.networks[0].client
    text = policy(lab, entry("web", source_ip, f"{POD_A}, {NODE}", extra=_destinations(outside)))
    command.apply(lab, state, text + f"backend: {backend}\n")
    with captured(lab) as capture:
        for family in FAMILIES:
            for role in ("pod_a", "node"):
                assert tcp_source(lab, role, outside.get(family)) in expected[family]
                assert udp_source(lab, role, outside.get(family)) in expected[family]
                flag = "-4" if family == 4 else "-6"
                lab[role].run("ping", flag, "-c", "1", "-W", "5", str(outside.get(family)))
    devices = {packet.device for family in FAMILIES for packet in capture.to(outside.get(family))}
    assert devices == {"eth0.100"}
    sources = {packet.source for family in FAMILIES for packet in capture.to(outside.get(family))}
    assert sources <= expected[4] | expected[6]
    assert "no drift" in command.datapath(lab, state, "status").stdout


def _destinations(*pairs: topo.Pair) -> str:
    listed = ", ".join(f'"{address}"' for pair in pairs for address in pair)
    return f"    destinations: [{listed}]\n"


def test_what_is_inside_stays_inside(lab: Lab, state: Path) -> None:
    command.apply(lab, state, policy(lab, entry("web", SOURCES["vip"][0], POD_A)))
    public = lab.networks[0]
    pod = {4: str(topo.POD_A.v4), 6: str(topo.POD_A.v6)}
    with captured(lab) as capture:
        for family in FAMILIES:
            assert tcp_source(lab, "pod_a", topo.POD_REMOTE.get(family), topo.BACKEND_PORT) == pod[family]
            assert tcp_source(lab, "pod_a", topo.NODE.get(family), topo.BACKEND_PORT) == pod[family]
            for backend in (Backend.REMOTE_POD, Backend.HOST_VIP, Backend.HOST_DNAT, Backend.LOCAL_POD):
                tcp_source(lab, "pod_a", public.vips[backend].get(family))
            # Whoever is no source of an entry, and what is opened from outside, goes as without the policy.
            assert tcp_source(lab, "pod_b", topo.ELSEWHERE.get(family)) == NODE_OUT[family]
            tcp_source(lab, "client", public.vips[Backend.LOCAL_POD].get(family))
    assert {device for device, _ in capture.ways(topo.POD_REMOTE.v4, topo.POD_REMOTE.v6)} == {"eth0"}
    assert capture.ways(topo.ELSEWHERE.v4) == {("eth0", NODE_OUT[4])}
    for family in FAMILIES:
        vip = public.vips[Backend.LOCAL_POD].get(family)
        assert capture.ways(public.client.get(family)) == {("eth0.100", str(vip))}
    assert sum(counters(lab).values()) == 0
    assert lab.wrong_way() == 0


def test_networks_that_isolate_their_clients(lab: Lab, state: Path) -> None:
    """An answer enters in the zone of its VLAN and finds the connection, which was opened in none."""
    text = lab.policy(
        network_extra="    isolate_clients: true\n",
        extra="egress:\n" + entry("web", SOURCES["vip"][0], POD_A),
    )
    command.apply(lab, state, text)
    public = lab.networks[0]
    for family in FAMILIES:
        assert tcp_source(lab, "pod_a", public.client.get(family)) == VIP[family]
        assert udp_source(lab, "pod_a", public.client.get(family)) == VIP[family]
        tcp_source(lab, "client", public.vips[Backend.LOCAL_POD].get(family))
    assert lab.wrong_way() == 0


def test_destinations_and_exclude(lab: Lab, state: Path) -> None:
    """The first entry that matches decides, and what no entry matches goes as without the policy."""
    one, two = lab.networks
    second = '["1.2.4.10", "2001:db8:200::10"]'
    command.apply(
        lab,
        state,
        policy(
            lab,
            entry("far", second, POD_A, extra=_destinations(two.client), by="public2"),
            entry(
                "rest",
                SOURCES["vip"][0],
                POD_A,
                extra='    exclude: [203.0.113.0/24, "2001:db8:ffff::/48"]\n',
            ),
        ),
    )
    for family in FAMILIES:
        assert (
            tcp_source(lab, "pod_a", two.client.get(family)) == {4: "1.2.4.10", 6: "2001:db8:200::10"}[family]
        )
        assert tcp_source(lab, "pod_a", one.client.get(family)) == VIP[family]
        assert tcp_source(lab, "pod_a", topo.ELSEWHERE.get(family)) == NODE_OUT[family]
    assert lab.wrong_way() == 0


def test_a_source_keeps_its_address_of_the_pool(lab: Lab, state: Path) -> None:
    command.apply(lab, state, policy(lab, entry("web", SOURCES["pool"][0], f"{POD_A}, {POD_B}")))
    outside = lab.networks[0].client
    before = {
        (role, family): {udp_source(lab, role, outside.get(family)) for _ in range(5)}
        for role in ("pod_a", "pod_b")
        for family in FAMILIES
    }
    assert {len(addresses) for addresses in before.values()} == {1}
    lab.node.run("nft", "delete", "table", "inet", "datapath")
    command.apply(lab, state, policy(lab, entry("web", SOURCES["pool"][0], f"{POD_A}, {POD_B}")))
    for (role, family), addresses in before.items():
        assert {udp_source(lab, role, outside.get(family))} == addresses


def test_a_set_is_filled_by_others_and_stays_filled(lab: Lab, state: Path) -> None:
    text = policy(lab, entry("jobs", SOURCES["vip"][0], extra=SET))
    command.apply(lab, state, text)
    outside = lab.networks[0].client
    assert egress(lab, state, "set", "jobs", "10.112.1.3", "fd00:10:112:1::/64") == "jobs: 2 member(s)\n"
    assert egress(lab, state, "add", "jobs", "10.112.1.3") == "nothing to do: jobs: 2 member(s)\n"
    for family in FAMILIES:
        assert tcp_source(lab, "pod_b", outside.get(family)) == VIP[family]
    assert "no drift" in command.datapath(lab, state, "status").stdout
    # Flushed by somebody, applied again, applied with other entries: the members come back with the table.
    lab.node.run("nft", "delete", "table", "inet", "datapath")
    command.apply(lab, state, text)
    assert tcp_source(lab, "pod_b", outside.v4) == VIP[4]
    command.apply(lab, state, policy(lab))
    assert "not in the policy in force" in egress(lab, state, "list")
    command.apply(lab, state, text)
    assert tcp_source(lab, "pod_b", outside.v4) == VIP[4]
    assert egress(lab, state, "get", "jobs") == "10.112.1.3\nfd00:10:112:1::/64\n"
    # By hand out of the kernel: drift, which an apply puts right, or the next change of that member.
    by_hand = "delete element inet datapath members4.jobs { 10.112.1.3 }"
    lab.node.run("nft", by_hand)
    assert command.datapath(lab, state, "status").returncode == 3
    command.apply(lab, state, text)
    assert "no drift" in command.datapath(lab, state, "status").stdout
    lab.node.run("nft", by_hand)
    assert egress(lab, state, "add", "jobs", "10.112.1.77") == "jobs: 3 member(s)\n"
    assert command.datapath(lab, state, "status").returncode == 3
    egress(lab, state, "remove", "jobs", "10.112.1.3")
    assert "no drift" in command.datapath(lab, state, "status").stdout
    assert egress(lab, state, "get", "jobs") == "10.112.1.77\nfd00:10:112:1::/64\n"
    # A wider prefix is no member, also where it begins as one does.
    egress(lab, state, "set", "jobs", "10.112.8.0/24")
    assert egress(lab, state, "remove", "jobs", "10.112.8.0/21") == "nothing to do: jobs: 1 member(s)\n"
    egress(lab, state, "set", "jobs")
    assert egress(lab, state, "get", "jobs") == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "job", "10.112.1.3"), r"no egress 'job'\n.*there are: jobs"),
        (("add", "web", "10.112.1.3"), "has no set: its sources are those of the policy"),
        (("add", "jobs", "10.112.1.300"), "not an address or a prefix"),
        (("add", "jobs", "10.112.1.3/24"), "host bits"),
        (("add", "jobs", "fd00::1"), "jobs has no IPv6"),
        (("add", "jobs", "0.0.0.0/0"), "every address"),
        (("add", "jobs", "127.0.0.1"), "loopback"),
        (("add", "jobs", "10.112.1.3; flush ruleset"), "not an address or a prefix"),
        (("remove", "jobs", "10.112.7.7"), "10.112.7.7 is a source by a wider member"),
        (("add", "jobs", "10.112.7.7"), "10.112.7.7 and 10.112.7.0/24 overlap"),
        (("set", "jobs", "10.112.0.0/16"), "10.112.7.0/24 and 10.112.0.0/16 overlap"),
        (("get", "job"), "no egress 'job'"),
    ],
)
def test_what_a_set_does_not_take(lab: Lab, state: Path, arguments: tuple[str, ...], words: str) -> None:
    command.apply(
        lab, state, policy(lab, entry("jobs", "1.2.3.10", extra=SET), entry("web", "network", POD_A))
    )
    egress(lab, state, "set", "jobs", "10.112.7.0/24")
    assert re.search(words, egress(lab, state, *arguments, status=2))
    assert egress(lab, state, "get", "jobs") == "10.112.7.0/24\n"


def test_connections_keep_their_way_and_their_address(lab: Lab, state: Path) -> None:
    outside = lab.networks[0].client
    # Opened before the policy: by eth0 as ever. The lab's gateway leads to nobody there but ELSEWHERE.
    command.apply(lab, state, policy(lab))
    with (
        connect(lab, "pod_a", topo.ELSEWHERE.v4) as before,
        datagrams(lab, "pod_a", topo.ELSEWHERE.v6) as older,
    ):
        older.send(b"who")
        assert json.loads(older.recv(200))["source"] == NODE_OUT[6]
        command.apply(lab, state, policy(lab, entry("web", SOURCES["vip"][0], extra=SET)))
        egress(lab, state, "set", "web", "10.112.1.2", "fd00:10:112:1::2")
        older.send(b"who")
        assert json.loads(older.recv(200))["source"] == NODE_OUT[6]
        assert json.loads(ask_line(before, "who"))["source"] == NODE_OUT[4]
        with connect(lab, "pod_a", outside.v4) as v4, connect(lab, "pod_a", outside.v6) as v6:
            for change in ("address", "removed", "both"):
                if change == "address":
                    command.apply(lab, state, policy(lab, entry("web", "network", extra=SET)))
                elif change == "removed":
                    egress(lab, state, "set", "web")
                else:
                    command.apply(lab, state, policy(lab, entry("other", "network", '"10.112.9.9"')))
                assert json.loads(ask_line(v4, "who"))["source"] == VIP[4], change
                assert json.loads(ask_line(v6, "who"))["source"] == VIP[6], change
    assert lab.wrong_way() == 0


def test_connections_of_what_is_gone_are_closed_and_leak_nothing(lab: Lab, state: Path) -> None:
    outside = lab.networks[0].client
    command.apply(lab, state, policy(lab, entry("web", SOURCES["vip"][0], POD_A)))
    with captured(lab) as capture, connect(lab, "pod_a", outside.v4) as open_one:
        ask_line(open_one, "who")
        open_one.settimeout(1)
        assert "mark=196608" in lab.node.run("cat", "/proc/net/nf_conntrack")
        printed = command.apply(lab, state, policy(lab))
        assert "delete conntrack entries with mark 0x00030000" in printed
        assert "mark=196608" not in lab.node.run("cat", "/proc/net/nf_conntrack")
        with pytest.raises(OSError, match=r".*"):
            ask_line(open_one, "who")
    # It is a connection like any other from now on: by eth0, with the node's address, and never with the VIP.
    assert capture.ways(outside.v4) <= {("eth0.100", VIP[4]), ("eth0", NODE_OUT[4])}
    lab.reset_counters()


def test_errors_about_a_connection_come_back_to_its_pod(lab: Lab, state: Path) -> None:
    command.apply(lab, state, policy(lab, entry("web", SOURCES["vip"][0], POD_A)))
    for family in FAMILIES:
        with datagrams(lab, "pod_a", lab.networks[0].client.get(family), port=9) as sock:
            sock.send(b"nobody is there")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(10)


def test_a_device_without_an_address_drops_and_says_so(lab: Lab, state: Path) -> None:
    """Nothing leaves with an address of another device."""
    own = ("addr del 1.2.4.9/24 dev eth0.200", "-6 addr del 2001:db8:200::9/64 dev eth0.200")
    lab.node.ip(own)
    printed = command.apply(lab, state, policy(lab, entry("web", "network", POD_A, by="public2")))
    assert "eth0.200 has no IPv4 address: IPv4 connections of these sources are dropped" in printed
    outside = lab.networks[1].client
    with captured(lab) as capture:
        for family in FAMILIES:
            with datagrams(lab, "pod_a", outside.get(family), seconds=0.5) as sock:
                sock.send(b"who")
                with pytest.raises(TimeoutError):
                    sock.recv(10)
    assert capture.ways(outside.v4, outside.v6) == set()
    assert counters(lab)["web.no_address"] == 2
    lab.add_vlan_address(lab.networks[1])
    command.apply(lab, state, policy(lab, entry("web", "network", POD_A, by="public2")))
    assert tcp_source(lab, "pod_a", outside.v4) == "1.2.4.9"


def test_what_belongs_to_no_connection_is_not_let_out(lab: Lab, state: Path) -> None:
    """A reset that nobody knows is invalid, and so is never translated."""
    command.apply(lab, state, policy(lab, entry("web", SOURCES["vip"][0], POD_A)))
    lab.node.sysctl({"net/netfilter/nf_conntrack_tcp_loose": 0})
    outside = lab.networks[0].client
    try:
        with captured(lab) as capture, lab["pod_a"].socket(socket.AF_INET, socket.SOCK_RAW, 6) as raw:
            raw.sendto(_reset(), (str(outside.v4), 0))
    finally:
        lab.node.sysctl({"net/netfilter/nf_conntrack_tcp_loose": 1})
    assert capture.to(outside.v4) == []
    assert counters(lab)["web.untracked"] == 1


def _reset() -> bytes:
    """A TCP segment from port 7 to port 80 with RST; its checksum is wrong, which makes it invalid, too."""
    return bytes([0, 7, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x04, 0, 0, 0, 0, 0, 0])


def test_a_missing_rule_or_device_lets_nothing_out_elsewhere(lab: Lab, state: Path) -> None:
    command.apply(lab, state, policy(lab, entry("web", SOURCES["vip"][0], POD_A)))
    outside = lab.networks[0].client
    with connect(lab, "pod_a", outside.v4) as known, captured(lab) as capture:
        ask_line(known, "who")
        known.settimeout(1)
        lab.node.run("ip", "-4", "rule", "flush", "protocol", "78")
        with datagrams(lab, "pod_a", outside.v4, seconds=0.3) as sock:
            sock.send(b"who")
            with pytest.raises(TimeoutError):
                sock.recv(10)
        with pytest.raises(TimeoutError):
            ask_line(known, "who")
        assert counters(lab)["public.wrong_device"] >= 2
        assert capture.ways(outside.v4) == {("eth0.100", VIP[4])}
        command.apply(lab, state, policy(lab, entry("web", SOURCES["vip"][0], POD_A)))
        assert udp_source(lab, "pod_a", outside.v4) == VIP[4]
        lab.node.run("ip", "link", "set", "eth0.100", "down")
        with datagrams(lab, "pod_a", outside.v4, seconds=0.3) as sock:
            sock.send(b"who")
            with pytest.raises(TimeoutError):
                sock.recv(10)
        lab.node.run("ip", "link", "set", "eth0.100", "up")
    assert [packet for packet in capture.to(outside.v4) if packet.device != "eth0.100"] == []
    lab.node.ip(["-6 addr replace 2001:db8:100::9/64 dev eth0.100 noprefixroute"])


def test_teardown_leaves_nothing(lab: Lab, tmp_path: Path) -> None:
    before = dump_namespace(lab.node)
    command.apply(lab, tmp_path, policy(lab, entry("web", SOURCES["vip"][0], POD_A, extra=SET)))
    egress(lab, tmp_path, "set", "web", "10.112.1.3")
    tcp_source(lab, "pod_a", lab.networks[0].client.v4)
    command.teardown(lab, tmp_path)
    assert difference(before, dump_namespace(lab.node)) == ""
    assert "mark=196608" not in lab.node.run("cat", "/proc/net/nf_conntrack")
