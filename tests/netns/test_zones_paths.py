# SPDX-License-Identifier: Apache-2.0
"""Two equal clients on two networks: fragments, ICMP errors, DNAT by the network, a node without any NAT."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.netns.equals import ISOLATED, both, datagrams_in_fragments, overlapping
from tools.lab import Backend, Lab, command
from tools.lab.servers import pattern_crc
from tools.lab.topology import FAMILIES, POD_B, VIP_BACKENDS
from tools.lab.traffic import ask_line, download, family

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SMALL_MTU = 1300


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(networks=overlapping()) as lab:
        command.apply(lab, tmp_path_factory.mktemp("state"), lab.policy(network_extra=ISOLATED))
        yield lab


@pytest.mark.parametrize("version", FAMILIES)
def test_fragments_of_equal_clients_are_not_mixed(isolated: Lab, version: int) -> None:
    assert datagrams_in_fragments(isolated, version) == {b"A" * 2000, b"B" * 2000}


@pytest.mark.parametrize("version", FAMILIES)
def test_path_mtu_of_one_network_is_told_to_its_own_connection(isolated: Lab, version: int) -> None:
    """The router's error quotes what left the node, which is the same for both clients."""
    lab, size = isolated, 1 << 19
    lab["router2"].ip([f"link set to-client2 mtu {SMALL_MTU}"])
    try:
        for number, backend in enumerate(VIP_BACKENDS):
            with both(lab, lab.networks[0].vips[backend].get(version), 40700 + number) as socks:
                for sock in reversed(socks):
                    assert download(sock, size) == pattern_crc(size), backend
    finally:
        lab["router2"].ip(["link set to-client2 mtu 1500"])
    assert lab.wrong_way() == 0


@pytest.mark.parametrize("version", FAMILIES)
def test_port_unreachable_goes_to_who_asked(isolated: Lab, version: int) -> None:
    lab = isolated
    vip = lab.networks[0].vips[Backend.HOST_VIP].get(version)
    for first in (0, 1):
        # Only one of them asks at a time, and the answer must not go to the other.
        with both(lab, vip, 40800 + first, kind=socket.SOCK_DGRAM, port=81) as socks:
            for sock in (socks[first], socks[1 - first]):
                sock.send(b"anyone?")
                with pytest.raises(ConnectionRefusedError):
                    sock.recv(100)
    assert lab.wrong_way() == 0


BY_NETWORK = """
table inet chooser {{
  chain pre {{
    type nat hook prerouting priority -101;
    iifname "{device}" ip daddr {v4} meta l4proto {{ tcp, udp }} th dport 80 dnat ip to {pod4}:8080
    iifname "{device}" ip6 daddr {v6} meta l4proto {{ tcp, udp }} th dport 80 dnat ip6 to [{pod6}]:8080
  }}
}}
"""


def test_the_same_vip_leads_to_another_pod_by_the_network(isolated: Lab) -> None:
    """Somebody's DNAT may look at the device; both are served, each by its own."""
    lab = isolated
    vips = lab.networks[1].vips[Backend.LOCAL_POD]
    lab.node.nft(
        BY_NETWORK.format(device=lab.networks[1].device, v4=vips.v4, v6=vips.v6, pod4=POD_B.v4, pod6=POD_B.v6)
    )
    try:
        for version in FAMILIES:
            target = vips.get(version)
            with ExitStack() as stack:
                pod = stack.enter_context(lab["pod_b"].socket(family(target), socket.SOCK_DGRAM))
                pod.bind((str(POD_B.get(version)), 8080))
                pod.settimeout(10)
                one, two = stack.enter_context(both(lab, target, 40900, kind=socket.SOCK_DGRAM))
                one.send(b"who")
                two.send(b"who")
                assert json.loads(one.recv(1000))["server"] == "pod_a"
                request, client = pod.recvfrom(100)
                assert (request, client[:2]) == (b"who", (str(lab.networks[0].client.get(version)), 40900))
                pod.sendto(b"pod_b", client)
                assert two.recv(100) == b"pod_b"
    finally:
        lab.node.nft("delete table inet chooser")
    assert lab.wrong_way() == 0


def test_both_are_served_where_nobody_else_translates_addresses(tmp_path: Path) -> None:
    """Without a NAT chain on the node the kernel looks for no other port; ours is one."""
    with Lab(networks=overlapping()) as lab:
        lab.node.nft("flush ruleset")
        command.apply(lab, tmp_path, lab.policy(network_extra=ISOLATED))
        for number, version in enumerate(FAMILIES):
            vip = lab.networks[0].vips[Backend.HOST_VIP].get(version)
            with both(lab, vip, 41000 + number) as socks:
                ports = {json.loads(ask_line(sock, "who"))["port"] for sock in socks}
                assert len(ports) == 2
            with both(lab, vip, 41000 + number, kind=socket.SOCK_DGRAM) as socks:
                for sock in socks:
                    sock.send(b"who")
                assert len({json.loads(sock.recv(1000))["port"] for sock in socks}) == 2
        assert lab.wrong_way() == 0


def test_zones_of_others_are_left_alone(tmp_path: Path) -> None:
    """A rule that sets a zone by a map, one of iptables, and a connection that is tracked in a zone both ways."""
    with Lab() as lab:
        lab.node.nft("""
            table inet vrf_zones {
              map zones { typeof iifname : ct zone; elements = { "lo" : 40001 }; }
              chain in { type filter hook prerouting priority -300; ct original zone set iifname map @zones; }
              chain out { type filter hook output priority -300; oifname "nowhere" ct zone set 40002; }
            }""")
        lab.node.run(
            "iptables-legacy", "-t", "raw", "-A", "PREROUTING", "-i", "nowhere", "-j", "CT", "--zone", "40003"
        )
        lab.node.nft("""
            table ip both_ways {
              chain out { type filter hook output priority -300; udp dport 9999 ct zone set 40004; }
            }""")
        lab.node.sysctl({"net/netfilter/nf_conntrack_udp_timeout": 3600})
        with lab.node.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"x", (str(lab.networks[0].gateway.v4), 9999))
        lab.node.nft("delete table ip both_ways")

        command.apply(lab, tmp_path, lab.policy(network_extra=ISOLATED))
        assert "zone=40005" in lab.node.run("nft", "list", "set", "inet", "datapath", "ids")

        # Somebody comes later: he is named, and another zone. What we have is not moved by itself.
        lab.node.nft(
            "table inet late { chain in { type filter hook input priority 0; iif lo ct zone set 40005; }; }"
        )
        said = command.datapath(lab, tmp_path, "doctor").stdout
        assert "warn  zones" in said
        assert "zone 40005 of network public is used by nft table inet late, chain in, too" in said
        assert "`zone: 40006`" in said
        lab.node.nft("delete table inet late")
        assert "ok    zones" in command.datapath(lab, tmp_path, "doctor").stdout
        status = json.loads(command.datapath(lab, tmp_path, "status", "--json").stdout)
        assert status["networks"][0]["zone"] == 40005
        assert "  ZONE   " in command.datapath(lab, tmp_path, "status").stdout

        pinned = tmp_path / "pinned.yaml"
        for zone, owner in (
            (40001, "nft table inet vrf_zones, chain in"),
            (40002, "nft table inet vrf_zones, chain out"),
            (40003, "iptables-legacy table raw, chain PREROUTING"),
            (40004, "connections that are tracked there"),
        ):
            pinned.write_text(lab.policy(network_extra=f"{ISOLATED}    zone: {zone}\n"))
            done = command.datapath(lab, tmp_path, "apply", str(pinned))
            assert done.returncode == 2
            assert f"networks[0].zone: connection-tracking zone {zone} is used by {owner}" in done.stderr
