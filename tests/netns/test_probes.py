# SPDX-License-Identifier: Apache-2.0
"""Probes on real links: what answers, what does not, and what becomes of the change and of those who are served."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.nodes import Node, node
from tests.netns.router import Flow, Router, router, tcp_server
from tools.lab.dump import difference, dump_namespace

pytestmark = [pytest.mark.root]

GATEWAYS = ("198.51.100.1/24", "2001:db8:1::1/64", "fe80::1/64")
TARGET = "198.51.100.50"
#: Behind the router; the node itself has no route there.
FAR = "203.0.113.7"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


def policy(
    *probes: str,
    gateway: str = "[198.51.100.1, '2001:db8:1::1']",
    deny: str = "",
    other: str = "strict",
    backend: str = "nft",
    device: str = "interface: eth9",
) -> str:
    lines = "probes:\n" + "".join(f"  - {probe}\n" for probe in probes) if probes else ""
    return f"""\
version: 1
backend: {backend}
networks:
  - name: public
    {device}
    vips: [198.51.100.64/26, "2001:db8:1:64::/64"]
    on_link: [198.51.100.0/24, "2001:db8:1::/64"]
    gateway: {gateway}
    reverse_path: {{deny: [{deny}], other: {other}}}
{lines}"""


class Site:
    """A node with one network, its router, and somebody who applies policies."""

    def __init__(self, where: Node, peer: Router, folder: Path) -> None:
        self.node = where
        self.router = peer
        self.folder = folder
        self.state = folder / "state"

    def run(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.node.datapath(self.state, verb, *arguments)

    def apply(self, text: str, *arguments: str, status: int = 0) -> str:
        path = self.folder / "policy.yaml"
        path.write_text(text)
        done = self.run("apply", str(path), *arguments)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def dump(self) -> dict[str, str]:
        return dump_namespace(self.node.namespace)

    def document(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.state / "state.json").read_text())
        return state


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with node(4) as made, router(made.namespace, "eth9", *GATEWAYS, f"{TARGET}/24") as peer:
        made.namespace.ip(["addr add 198.51.100.2/24 dev eth9", "addr add 198.51.100.70/32 dev lo"])
        # Neighbour discovery asks from a link-local address; the devices of `node` get none by themselves.
        made.namespace.ip(["-6 addr add fe80::2/64 dev eth9"])
        peer.add("198.51.100.40/24")
        yield Site(made, peer, tmp_path)


@pytest.mark.parametrize("addresses", ["global", "link-local"])
def test_gateways_answer_whatever_address_the_device_has(site: Site, addresses: str) -> None:
    """Also by an IPv4 address of another device, as replies would ask."""
    if addresses == "link-local":
        site.node.namespace.ip(["-4 addr flush dev eth9"])
    assert "warning" not in site.apply(policy("gateway: public"))
    # The entry is there now, and is asked again.
    assert "warning" not in site.apply(policy("gateway: public", gateway="[198.51.100.1, 'fe80::1']"))


def test_a_gateway_known_from_before_is_asked_again(site: Site) -> None:
    """It answered a moment ago, and its entry says so; it is gone when the change is judged."""
    text = policy("{gateway: public, timeout: 4, attempts: 1}", gateway="198.51.100.1")
    site.node.namespace.run("ping", "-c", "1", "-W", "2", "198.51.100.1")
    site.router.remove("198.51.100.1/24")
    assert "REACHABLE" in site.node.run("ip", "neigh", "show", "198.51.100.1")
    assert "gateway 198.51.100.1 of public fails after the change" in site.apply(text, status=1)


@pytest.mark.parametrize(
    ("gateway", "named"),
    [
        ("[198.51.100.9, '2001:db8:1::1']", "gateway 198.51.100.9 of public"),
        ("[198.51.100.1, '2001:db8:1::9']", "gateway 2001:db8:1::9 of public"),
        ("'fe80::9'", "gateway fe80::9 of public"),
    ],
)
def test_gateway_that_does_not_answer_undoes_the_change(site: Site, gateway: str, named: str) -> None:
    bare = site.dump()
    wrong = policy("{gateway: public, timeout: 1, attempts: 2}", gateway=gateway)
    message = site.apply(wrong, status=1)
    assert (
        f"policy.yaml:11: probe {named} fails after the change: no answer within 1 s (2 attempts)" in message
    )
    assert "its network is new with the change" in message
    assert "hint: the change was undone; check the gateway's address and the device or VLAN" in message
    assert difference(bare, site.dump()) == ""
    assert site.document()["policy"] == ""
    # The same where a good policy is in force: it stays, with its generation.
    site.apply(policy("gateway: public"))
    good, generation = site.dump(), site.document()["generation"]
    site.apply(wrong, status=1)
    assert difference(good, site.dump()) == ""
    assert site.document()["generation"] == generation
    assert "no drift" in site.run("status").stdout


@pytest.mark.vm
@pytest.mark.one_kernel("6.12")
@pytest.mark.kernel_feature("8021q")
def test_gateway_on_a_vlan_that_the_change_makes(site: Site) -> None:
    """Nothing can be tried before; the wrong VLAN id is noticed all the same.

    Left out on 6.1: VLAN devices are made and taken away there, too (tests/vm/test_devices_vm.py), and the rest of a
    probe knows nothing of them.
    """
    site.router.namespace.ip(["link add link uplink name tagged type vlan id 100", "link set tagged up"])
    site.router.remove("198.51.100.1/24")
    site.router.add("198.51.100.1/24", device="tagged")

    def tagged(number: int) -> str:
        probe = "{gateway: public, timeout: 1, attempts: 1}"
        return policy(probe, gateway="198.51.100.1", device=f"vlan: {{parent: eth9, id: {number}}}")

    bare = site.dump()
    message = site.apply(tagged(101), status=1)
    assert "gateway 198.51.100.1 of public fails after the change" in message
    assert "its network is new with the change" in message
    assert difference(bare, site.dump()) == ""
    assert "verified" in site.apply(tagged(100))


def test_what_failed_before_does_not_stand_in_the_way(site: Site) -> None:
    """The gateway is down, and so is a server; the policy is repaired meanwhile."""
    probes = ("{gateway: public, attempts: 1, timeout: 1}", f"{{tcp: {TARGET}:443, attempts: 1}}")
    with tcp_server(site.router.namespace, TARGET, 443):
        site.apply(policy(*probes))
    site.router.remove("198.51.100.1/24")
    site.router.add("198.51.100.50/24", "198.51.100.40/24")
    message = site.apply(policy(*probes, deny="192.0.2.0/24"))
    assert "probe gateway 198.51.100.1 of public fails, as before the change: no answer within 1 s" in message
    assert (
        f"probe tcp {TARGET}:443 fails, as before the change: connection refused; it does not count"
        in message
    )
    assert "2001:db8:1::1" not in message
    notes = json.loads(site.run("apply", str(site.folder / "policy.yaml"), "--json").stdout)["notes"]
    assert notes == [], "nothing was to be done, nothing was tried"


@pytest.mark.parametrize("backend", ["nft", pytest.param("ebpf", marks=pytest.mark.bpf)])
def test_lost_target_undoes_the_change_and_nobody_else_notices(site: Site, backend: str) -> None:
    probe = f"{{tcp: {TARGET}:443, timeout: 1, attempts: 1}}"
    with tcp_server(site.router.namespace, TARGET, 443) as clients:
        site.apply(policy(probe, backend=backend))
        assert clients == ["198.51.100.2"] * 2, "before and after"
        good = site.dump()
        with Flow(site.node.namespace, "198.51.100.70", site.router.namespace, "198.51.100.40") as flow:
            message = site.apply(policy(probe, deny=f"{TARGET}/32", backend=backend), status=1)
        assert (
            f"probe tcp {TARGET}:443 fails after the change: no answer within 1 s; it worked before"
            in message
        )
        assert "check routes and `reverse_path`" in message
        assert difference(good, site.dump()) == ""
        assert "no drift" in site.run("status").stdout
    assert flow.sent > 100
    assert flow.lost == [], f"of {flow.sent}"


def test_the_new_policy_was_in_force_when_it_was_judged(site: Site) -> None:
    """A probe of what only the new policy allows works: it is tried after the change, not instead of it."""
    probe = f"{{tcp: {TARGET}:443, timeout: 1, attempts: 1}}"
    with tcp_server(site.router.namespace, TARGET, 443):
        site.apply(policy(deny=f"{TARGET}/32"))
        assert "warning" not in site.apply(policy(probe))


@pytest.mark.parametrize(
    ("answer", "seen"),
    [
        (OK, ""),
        (b"HTTP/1.0 302 Found\r\n\r\n", ""),
        (b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "status 503"),
        (b"HTTP/1.1 404 \r\n\r\n", "status 404"),
        (b"SSH-2.0-x\r\n", "connected, but what answers is not HTTP"),
        (b"", "connected, but closed without an answer"),
    ],
)
def test_http(site: Site, answer: bytes, seen: str) -> None:
    probe = f"{{http: 'http://{TARGET}:8080/healthz?full=1', network: public, timeout: 1, attempts: 1}}"
    with tcp_server(site.router.namespace, TARGET, 8080, answer):
        message = site.apply(policy(probe), status=1 if seen else 0)
    if seen:
        assert (
            f"probe http http://{TARGET}:8080/healthz?full=1 by public fails after the change: {seen};"
            in message
        )


def test_http_server_that_drips_holds_nobody(site: Site) -> None:
    """Each byte comes in time, the answer does not: it would take twenty seconds."""
    site.node.namespace.ip(["-6 addr add 2001:db8:1::2/64 dev eth9"])
    probe = "{http: 'http://[2001:db8:1::1]/', network: public, timeout: 1, attempts: 1}"
    with tcp_server(site.router.namespace, "2001:db8:1::1", 80, b"HTTP/1.1 20", drip_s=0.5):
        assert "fails after the change: no answer within 1 s" in site.apply(policy(probe), status=1)
    with tcp_server(site.router.namespace, "2001:db8:1::1", 80, OK):
        assert "verified" in site.apply(policy(probe))


def test_by_a_network_means_by_its_gateway(site: Site) -> None:
    """The main table knows no way to the target; the network's own table does."""
    site.router.namespace.ip([f"addr add {FAR}/32 dev lo"])
    # Bound only to the device, the kernel would ask for the target on the link: the router must not answer that.
    site.router.namespace.sysctl({"net/ipv4/conf/uplink/arp_ignore": 1})
    with tcp_server(site.router.namespace, FAR, 443) as clients:
        message = site.apply(policy(f"{{tcp: {FAR}:443, attempts: 1}}", other="off"))
        assert "fails, as before the change: network is unreachable" in message
        assert clients == []
        site.apply(policy(f"{{tcp: {FAR}:443, network: public, attempts: 1}}", other="off"))
        assert clients == ["198.51.100.2"]
        # Its answers come from where the main table would not send them: the strict check refuses them.
        message = site.apply(policy(f"{{tcp: {FAR}:443, network: public, attempts: 1}}"), status=1)
        assert "it worked before" in message


def test_probes_are_tried_side_by_side_and_going_back_tries_none(site: Site) -> None:
    silent = [f"{{tcp: '198.51.100.{n}:1', attempts: 1, timeout: 2}}" for n in range(100, 130)]
    site.apply(policy())
    began = time.monotonic()
    message = site.apply(policy(*silent, deny="192.0.2.0/24"))
    assert message.count("as before the change") == 30
    assert time.monotonic() - began < 50, "two seconds before and two after, not sixty each"
    assert "probe" not in site.run("rollback").stdout
