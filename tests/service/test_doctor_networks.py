# SPDX-License-Identifier: Apache-2.0
"""`datapath doctor` about gateways and egress, on real links: it asks, and says who answers and who does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datapath.kernel.host import packet_sockets
from tests.service.daemon import PATIENCE_S, Daemon, wait_until
from tests.service.gateway_ground import Ground, gateway_address, policy_of

pytestmark = [pytest.mark.root, pytest.mark.bpf]

Found = list[dict[str, str]]
OWN = {4: "203.0.113.50", 6: "2001:db8:113::50"}
VIPS = {4: "203.0.113.10", 6: "2001:db8:113::10"}
EGRESS = (
    "egress:\n"
    f"  - {{name: web, network: public, sources: [10.112.1.2, 'fd00:10:112::2'],"
    f" source_ip: ['{VIPS[4]}', '{VIPS[6]}']}}\n"
    "  - {name: jobs, network: public, set: true, source_ip: network}\n"
)


@pytest.fixture
def ground(tmp_path: Path) -> Iterator[Ground]:
    """A node with two gateways and an address of its own on their link."""
    made = Ground(tmp_path, 2, own_address=True)
    made.policy.write_text(policy_of(range(1, 3)))
    yield made
    made.close()


def look(ground: Ground, check: str, *arguments: str) -> Found:
    """Findings of one check."""
    done = ground.datapath("doctor", "--json", *arguments)
    assert done.stdout, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if document["ok"] else 1)
    found = [item for item in document["findings"] if item["check"] == check]
    for item in found:
        assert bool(item["matters"]) == bool(item["remedy"]) == (item["severity"] != "ok"), item
    return found


def severities(found: Found) -> list[str]:
    return sorted(item["severity"] for item in found)


def test_gateways_that_answer_and_do_not(ground: Ground) -> None:
    """Before the policy is applied, without a daemon, and with one."""
    before = ground.snapshot()
    (found,) = look(ground, "gateways", str(ground.policy))
    assert (found["severity"], found["seen"]) == ("ok", "all 4 that are watched answer")
    assert ground.snapshot() == before
    ground.remove_gateway(1)
    found, other = look(ground, "gateways", str(ground.policy))
    assert (found["severity"], other["severity"]) == ("warn", "warn"), "a family each"
    assert found["seen"] == f"of network public does not answer on eth0: {gateway_address(1, 4)}"
    assert ground.datapath("apply", str(ground.policy)).returncode == 0
    found, _ = look(ground, "gateways")
    assert found["severity"] == "fail"
    assert "no daemon runs" in found["matters"]
    with Daemon(ground).started():
        found, _ = look(ground, "gateways")
        assert found["severity"] == "warn"
        ground.remove_gateway(2)
        found, other = look(ground, "gateways")
    assert (found["severity"], other["severity"]) == ("fail", "fail")
    assert found["seen"].startswith("none of the IPv4 gateways of network public answers on eth0")
    assert "as if they were up" in found["matters"]
    assert "echo" not in found["remedy"]


def test_a_link_without_a_carrier_is_what_is_said_of_its_gateways(ground: Ground) -> None:
    ground.link.ip(["link set p-eth0 down"])
    wait_until(lambda: "NO-CARRIER" in ground.ns.run("ip", "link", "show", "dev", "eth0"), "it is seen")
    (four, six) = look(ground, "gateways", str(ground.policy))
    assert (four["severity"], six["severity"]) == ("warn", "warn")
    assert "cannot be asked on eth0: the device has no carrier" in four["seen"]


def test_the_daemon_may_not_ask(ground: Ground) -> None:
    """As under the packaged unit, which allows packet sockets to nobody: here, the capability is missing."""
    argv = [sys.executable, "-m", "datapath", "run", str(ground.policy), "--state-dir", str(ground.state)]
    log = ground.folder / "restricted"
    with (
        log.open("w") as file,
        subprocess.Popen(
            ground.ns.argv("setpriv", "--bounding-set=-net_raw", *argv), stdout=file, stderr=file
        ) as process,
    ):
        try:
            wait_until(lambda: "gateway_cannot_be_asked" in log.read_text(), "it has tried")
            assert packet_sockets(process.pid) == 0
            found = [item for item in look(ground, "gateways") if "packet socket" in item["seen"]]
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
    assert severities(found) == ["fail"]
    assert f"pid {process.pid}" in found[0]["seen"]
    assert "RestrictAddressFamilies=AF_PACKET" in found[0]["remedy"]
    with Daemon(ground).started() as daemon:
        wait_until(lambda: packet_sockets(daemon.process.pid) == 2, "one for each family")
        assert severities(look(ground, "gateways")) == ["ok"]


def test_a_gateway_in_no_subnet_of_its_device(ground: Ground) -> None:
    ground.ns.ip([f"addr del {OWN[4]}/24 dev eth0", "addr add 203.0.112.50/24 dev eth0"])
    found = [item for item in look(ground, "gateways", str(ground.policy)) if "subnet" in item["seen"]]
    assert severities(found) == ["warn"]
    both = f"{gateway_address(1, 4)}, {gateway_address(2, 4)}"
    assert found[0]["seen"].startswith(f"{both} of network public in no subnet of eth0 (203.0.112.50/24")
    ground.ns.ip(["addr flush dev eth0 scope global"])
    found = look(ground, "gateways", str(ground.policy))
    assert not any("subnet" in item["seen"] for item in found), "most VIP networks have no address here"


def test_egress_whose_address_another_machine_answers_for(ground: Ground) -> None:
    ground.policy.write_text(policy_of(range(1, 3)) + EGRESS)
    assert severities(look(ground, "egress", str(ground.policy))) == ["ok"]
    ground.routers[2].ip(
        [f"addr add {VIPS[4]}/32 dev eth0", f"-6 addr add {VIPS[6]}/128 dev eth0 nodad"],
    )
    link = json.loads(ground.routers[2].run("ip", "-j", "link", "show", "dev", "eth0"))[0]["address"]
    (found,) = look(ground, "egress", str(ground.policy))
    assert found["severity"] == "fail"
    assert f"web: {link} on eth0 answers for {VIPS[4]} (and for 1 more)" in found["seen"]
    ground.routers[2].ip([f"addr del {VIPS[4]}/32 dev eth0", f"-6 addr del {VIPS[6]}/128 dev eth0"])
    # Another device of this node on the same link is no other machine.
    ground.link.ip([f"link add name second type veth peer name eth9 netns {ground.ns.name}"])
    ground.link.ip(["link set second master switch", "link set second up"])
    ground.ns.ip(["link set eth9 up", f"addr add {VIPS[4]}/32 dev eth9"])
    wait_until(
        lambda: json.loads(ground.ns.run("ip", "-j", "link", "show", "dev", "eth9"))[0]["operstate"] == "UP",
        "it takes packets",
    )
    assert severities(look(ground, "egress", str(ground.policy))) == ["ok"]


def test_egress_without_members_or_addresses_and_beside_another_translator(ground: Ground) -> None:
    ground.policy.write_text(policy_of(range(1, 3)) + EGRESS)
    assert ground.datapath("apply", str(ground.policy)).returncode == 0
    (found,) = look(ground, "egress")
    assert (found["severity"], found["seen"]) == (
        "warn",
        "the set of jobs is empty, and it has no other sources",
    )
    assert "datapath egress set jobs" in found["remedy"]
    assert ground.datapath("egress", "set", "jobs", "10.112.1.3").returncode == 0
    assert severities(look(ground, "egress")) == ["ok"]
    ground.ns.nft(
        "table ip late { chain c { type nat hook postrouting priority 100; masquerade; }; };"
        "table ip early { chain c { type nat hook postrouting priority 50; ip saddr 10.0.0.1 masquerade; }; }"
    )
    (found,) = look(ground, "egress")
    assert found["severity"] == "warn"
    assert "nft table ip early, chain c translates sources at priority 50" in found["seen"]
    ground.ns.nft("delete table ip early")
    ground.ns.ip(["-4 addr flush dev eth0 scope global"])
    (found,) = look(ground, "egress", str(ground.policy))
    assert found["severity"] == "fail"
    assert found["seen"] == "jobs: `source_ip: network`, and eth0 has no IPv4 address"
