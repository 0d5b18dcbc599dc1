# SPDX-License-Identifier: Apache-2.0
"""`datapath doctor` on real nodes: each check is seen to complain, and seen to be content."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from datapath import cli
from datapath.kernel import host, sysctl
from tests.netns.nodes import inside
from tests.service.daemon import FIRST, SECOND, Daemon, Node, network, policy, wait_until
from tests.service.mounts import MountedNode
from tools.lab.dump import difference, dump_namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf]

Found = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """Two networks in force, and nothing wrong but that no daemon runs."""
    made = Node(tmp_path_factory.mktemp("node"))
    made.ns.sysctl({"net/ipv4/ip_forward": 1, "net/ipv6/conf/all/forwarding": 1})
    made.policy.write_text(policy(FIRST, SECOND + "    strict_arp: true\n"))
    done = made.datapath("apply", str(made.policy))
    assert done.returncode == 0, done.stderr
    yield made
    made.close()


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Node]:
    """No policy."""
    made = Node(tmp_path)
    yield made
    made.close()


@pytest.fixture
def look(capsys: pytest.CaptureFixture[str]) -> Any:
    """The command in this process, inside a node: findings by check, the worst of each; and the exit status."""

    def run(node: Node, *arguments: str) -> tuple[Found, int]:
        with inside(node.ns.name):
            status = cli.main(["doctor", "--json", *arguments, "--state-dir", str(node.state)])
        return _found(capsys.readouterr().out, status), status

    return run


def _found(text: str, status: int) -> Found:
    document = json.loads(text)
    order = {"ok": 0, "warn": 1, "fail": 2}
    found: Found = {}
    for item in document["findings"]:
        assert item["seen"]
        assert bool(item["matters"]) == bool(item["remedy"]) == (item["severity"] != "ok"), item
        old = found.get(item["check"])
        if old is None or order[old["severity"]] < order[item["severity"]]:
            found[item["check"]] = item
    failed = any(item["severity"] == "fail" for item in found.values())
    assert document["ok"] != failed
    assert status == (1 if failed else 0)
    return found


def _outside(node: Node, *prefix: str) -> Found:
    """The command as a process of its own, for what belongs to processes: capabilities, mounts."""
    command = [sys.executable, "-m", "datapath", "doctor", "--json", "--state-dir", str(node.state)]
    argv = node.ns.argv(*prefix, *command)
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return _found(done.stdout, done.returncode)


def test_nothing_is_changed(node: Node, bare: Node, look: Any) -> None:
    for each in (node, bare):
        before = dump_namespace(each.ns)
        files = {path: path.read_bytes() for path in each.state.rglob("*") if path.is_file()}
        look(each)
        look(each, str(node.policy))
        assert difference(before, dump_namespace(each.ns)) == ""
        assert {path: path.read_bytes() for path in each.state.rglob("*") if path.is_file()} == files
    assert not bare.state.exists()


def test_a_node_without_a_policy(bare: Node, look: Any) -> None:
    found, status = look(bare)
    assert status == 0
    assert {item["severity"] for item in found.values()} == {"ok"}
    assert "no policy is in force" in found["generation"]["seen"]
    assert "free profiles" in found["marks"]["seen"]
    bare.ns.nft(
        "table ip other { chain c { type filter hook prerouting priority 0; meta mark set 0x00100000; }; }"
    )
    found, _ = look(bare)
    assert "0x00100000" in found["marks"]["seen"]
    assert "default" not in found["marks"]["seen"].partition("free")[2]
    bare.ns.ip(["rule add fwmark 0x0/0x7fffffff lookup 77 pref 900"])
    found, _ = look(bare)
    assert found["marks"]["severity"] == "warn"


def test_a_node_that_is_well(node: Node, look: Any) -> None:
    found, status = look(node)
    assert status == 0
    assert {check: item["severity"] for check, item in found.items() if item["severity"] != "ok"} == {
        "daemon": "warn"
    }


def test_the_text_for_people(node: Node) -> None:
    done = node.datapath("doctor")
    assert done.returncode == 0, done.stderr
    assert "warn  daemon: does not run\n      why it matters: " in done.stdout
    assert "      what to do: " in done.stdout
    assert done.stdout.endswith(", 1 warn, 0 fail\n")


def test_forwarding(node: Node, look: Any) -> None:
    for key, name in (("net/ipv4/ip_forward", "ip_forward"), ("net/ipv6/conf/all/forwarding", "ipv6")):
        node.ns.sysctl({key: 0})
        try:
            found, status = look(node)
        finally:
            node.ns.sysctl({key: 1})
        assert (found["forwarding"]["severity"], status) == ("warn", 1 if "drift" in _bad(found) else 0)
        assert name in found["forwarding"]["seen"]


def _bad(found: Found) -> set[str]:
    return {check for check, item in found.items() if item["severity"] == "fail"}


def test_rp_filter_by_device_and_by_all(node: Node, look: Any) -> None:
    for place in ("eth0", "all"):
        key = f"net/ipv4/conf/{place}/rp_filter"
        node.ns.sysctl({key: 2})
        try:
            found, status = look(node)
        finally:
            node.ns.sysctl({key: 0})
        assert status == 1
        assert {"rp_filter", "drift"} <= _bad(found)
        assert "eth0" in found["rp_filter"]["seen"]
        assert ("eth1" in found["rp_filter"]["seen"]) == (place == "all")


def test_strict_arp_that_all_overrides(node: Node, look: Any) -> None:
    node.ns.sysctl({"net/ipv4/conf/all/arp_ignore": 3})
    try:
        found, _ = look(node)
    finally:
        node.ns.sysctl({"net/ipv4/conf/all/arp_ignore": 0})
    assert found["arp"]["severity"] == "warn"
    assert "arp_ignore of eth1 is in effect 3, not 1" in found["arp"]["seen"]


def test_src_valid_mark_beside_strict_rp_filter(node: Node, look: Any) -> None:
    node.ns.sysctl({"net/ipv4/conf/all/src_valid_mark": 1})
    try:
        assert look(node)[0]["src_valid_mark"]["severity"] == "ok", "no device is strict"
        node.ns.sysctl({"net/ipv4/conf/p-eth0/rp_filter": 1})
        found, _ = look(node)
        node.ns.sysctl({"net/ipv4/conf/p-eth0/rp_filter": 0})
    finally:
        node.ns.sysctl({"net/ipv4/conf/all/src_valid_mark": 0})
    assert found["src_valid_mark"]["severity"] == "fail"
    assert "p-eth0" in found["src_valid_mark"]["seen"]


def test_marks_and_rules_of_others(node: Node, look: Any) -> None:
    rule = ["rule add fwmark 0x10000/0x30000 lookup 77 pref 900"]
    node.ns.ip(rule)
    node.ns.nft("table ip other { chain c { type filter hook forward priority 0; meta mark set 0x20000; }; }")
    try:
        found, status = look(node)
        node.ns.ip([rule[0].replace("add", "del")])
        by_nft = look(node)[0]["conflict"]
    finally:
        node.ns.run("ip", "rule", "flush", "priority", "900")
        node.ns.nft("delete table ip other")
    assert by_nft["severity"] == "fail"
    assert "nft table ip other, chain c" in by_nft["seen"]
    assert look(node)[0]["conflict"]["severity"] == "ok"
    assert (found["conflict"]["severity"], status) == ("fail", 1)
    assert "marks.mask" in found["conflict"]["remedy"]
    assert "0x00030000" in found["marks"]["seen"]


def test_a_mask_that_has_no_value_left(bare: Node, look: Any) -> None:
    bare.policy.write_text(policy(FIRST, SECOND).replace("networks:", "marks: {mask: 0x30000}\nnetworks:"))
    assert look(bare, str(bare.policy))[0]["marks"]["severity"] == "ok", "2 of 3"
    third = network("third", "p-eth0", 115)
    bare.policy.write_text(
        policy(FIRST, SECOND, third).replace("networks:", "marks: {mask: 0x30000}\nnetworks:")
    )
    assert look(bare, str(bare.policy))[0]["marks"]["severity"] == "warn"


def test_a_policy_that_is_to_be_applied(bare: Node, look: Any) -> None:
    bare.policy.write_text(policy(FIRST, network("gone", "eth7", 117)))
    found, status = look(bare, str(bare.policy))
    assert status == 1
    assert "eth7" in found["conflict"]["seen"]
    assert "drift" not in found
    assert "daemon" not in found
    bare.policy.write_text(policy(FIRST))
    assert "conflict" not in _bad(look(bare, str(bare.policy))[0])


def test_drift_and_devices(node: Node, look: Any) -> None:
    node.ns.ip(["link set eth0 down"])
    try:
        found, status = look(node)
    finally:
        node.ns.ip(["link set eth0 up"])
        assert node.datapath("apply", str(node.policy)).returncode == 0
    assert status == 1
    assert "eth0" in found["devices"]["seen"]
    node.ns.run("ip", "rule", "flush", "protocol", "78")
    found, _ = look(node)
    assert "add rule" in found["drift"]["seen"]
    assert node.datapath("apply", str(node.policy)).returncode == 0


def test_agents_that_a_device_gives_away(node: Node, look: Any) -> None:
    assert "other agents" not in look(node)[0]
    node.ns.ip(["link add cilium_host type veth peer name cilium_net"])
    try:
        assert "netfilter" in look(node)[0]["other agents"]["matters"]
    finally:
        node.ns.ip(["link del cilium_host"])


def test_ovn_kubernetes_owns_priorities(bare: Node, look: Any) -> None:
    bare.policy.write_text(policy(FIRST).replace("networks:", "rules: {priority: 1990}\nnetworks:"))
    assert "other agents" not in _bad(look(bare, str(bare.policy))[0])
    bare.ns.ip(["link add ovn-k8s-mp0 type veth peer name ovn-peer"])
    found, _ = look(bare, str(bare.policy))
    priorities = bare.datapath("compile", str(bare.policy)).stdout
    assert ("other agents" in _bad(found)) == ("2000" in priorities)


def test_daemon_and_probation(node: Node, look: Any) -> None:
    with Daemon(node) as daemon:
        daemon.started()
        assert look(node)[0]["daemon"]["seen"] == f"runs (pid {daemon.process.pid})"
    text = node.policy.read_text()
    node.policy.write_text(policy(FIRST))
    assert node.datapath("apply", str(node.policy), "--confirm", "600").returncode == 0
    found, status = look(node)
    assert (found["generation"]["severity"], status) == ("warn", 0)
    assert "goes back to generation" in found["generation"]["matters"]
    assert node.datapath("confirm").returncode == 0
    assert look(node)[0]["generation"]["severity"] == "ok"
    node.policy.write_text(text)
    assert node.datapath("apply", str(node.policy)).returncode == 0


def test_state_directory(tmp_path: Path) -> None:
    node = MountedNode(tmp_path)
    try:
        found = _outside(node)
        assert found["state directory"]["severity"] == "warn", "a quarter of a MiB"
        node.fill()
        assert found["state directory"] != (full := _outside(node)["state directory"])
        assert full["severity"] == "fail"
        node.make_room()
        (node.seen / "state.json").write_text("{")
        assert "damaged" in _outside(node)["state directory"]["seen"]
        (node.seen / "state.json").unlink()
        node.read_only()
        assert "cannot be written" in _outside(node)["state directory"]["seen"]
    finally:
        node.close()


def test_capabilities_and_what_they_cost(bare: Node) -> None:
    assert _outside(bare, "setpriv", "--bounding-set=-net_raw")["capabilities"]["severity"] == "warn"
    lesser = _outside(bare, "setpriv", "--bounding-set=-sys_admin,-bpf,-perfmon")
    assert "eBPF" in lesser["capabilities"]["matters"]
    assert lesser["kernel: ebpf"]["severity"] == "warn"
    assert "not tried" in lesser["kernel: nft"]["seen"]
    nobody = _outside(bare, "setpriv", "--bounding-set=-net_admin")
    assert nobody["capabilities"]["severity"] == "fail"


@contextmanager
def _networkd(node: Node, folder: Path) -> Iterator[None]:
    """A process of that name in the node: the name is what is looked for."""
    program = folder / "systemd-networkd"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen(node.ns.argv(str(program), "300")) as process:
        try:
            comm = Path(f"/proc/{process.pid}/comm")
            wait_until(lambda: comm.read_text().startswith("systemd-network"), "it runs under its name")
            yield
        finally:
            process.kill()


def test_networkd(tmp_path: Path) -> None:
    node = MountedNode(tmp_path)
    try:
        node.mount("-t", "tmpfs", "none", "/etc/systemd")
        drop_in = node.root / "etc/systemd/networkd.conf.d/50-datapath.conf"
        assert _outside(node)["systemd-networkd"]["seen"] == "does not run here"
        with _networkd(node, tmp_path):
            found = _outside(node)["systemd-networkd"]
            assert found["severity"] == "warn", "no rules of ours yet"
            assert "ManageForeignRoutingPolicyRules=yes (the default)" in found["seen"]
            node.policy.write_text(policy(FIRST))
            assert node.datapath("apply", str(node.policy)).returncode == 0
            assert _outside(node)["systemd-networkd"]["severity"] == "fail"
            drop_in.parent.mkdir()
            shutil.copyfile("packaging/networkd.conf.d/50-datapath.conf", drop_in)
            found = _outside(node)["systemd-networkd"]
            assert found["severity"] == "warn"
            assert "restart" in found["remedy"]
        with _networkd(node, tmp_path):
            assert _outside(node)["systemd-networkd"]["severity"] == "ok"
    finally:
        node.close()


def test_network_manager_and_a_device_that_we_make(
    bare: Node, look: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare.policy.write_text(policy(FIRST.replace("interface: eth0", "vlan: {parent: eth0, id: 5}")))
    # Not every kernel that runs this has VLANs; what counts is the name.
    bare.add_device("eth0.5")
    monkeypatch.setattr(host, "_NM_DEVICES", tmp_path / "devices")
    assert "NetworkManager" not in look(bare, str(bare.policy))[0]
    (tmp_path / "devices").mkdir()
    index = json.loads(bare.ns.run("ip", "-j", "link", "show", "eth0.5"))[0]["ifindex"]
    for managed, severity in (("false", None), ("true", "warn")):
        (tmp_path / "devices" / str(index)).write_text(f"[device]\nmanaged={managed}\n")
        found = look(bare, str(bare.policy))[0].get("NetworkManager")
        assert (found and found["severity"]) == severity


def test_conntrack_is_what_the_kernel_says(bare: Node, look: Any) -> None:
    with inside(bare.ns.name):
        most = sysctl.read("net/netfilter/nf_conntrack_max")
    assert look(bare)[0]["conntrack"]["seen"] == f"0 of {most} entries"
