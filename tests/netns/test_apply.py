# SPDX-License-Identifier: Apache-2.0
"""apply, status and teardown as a user runs them, in a namespace, and everything that can stand in their way."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from datapath.kernel.bpf import attachments
from datapath.plan.tc import Hook
from tests.netns.nodes import Node, datapath_argv, node
from tools.lab.dump import difference, dump_namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf]

ONE = """\
version: 1
networks:
  - name: public
    interface: eth1
    vips: [198.51.100.0/24, "2001:db8:1::/64"]
    gateway: [198.51.100.1, "2001:db8:1::1"]
    strict_arp: true
"""
TWO = f"""{ONE}
  - name: partners
    interface: eth3
    vips: [203.0.113.0/24]
    gateway: 203.0.113.1
"""


class User:
    """Somebody at the command line of a node."""

    def __init__(self, where: Node, folder: Path) -> None:
        self.node = where
        self.folder = folder
        self.state = folder / "state"
        self.before = self.dump()

    def dump(self) -> dict[str, str]:
        return dump_namespace(self.node.namespace)

    def changed(self) -> str:
        """What is not as it was in the beginning."""
        return difference(self.before, self.dump())

    def policy(self, text: str) -> str:
        path = self.folder / "policy.yaml"
        path.write_text(text)
        return str(path)

    def run(self, verb: str, *arguments: str, status: int = 0) -> str:
        """Output of a verb, both streams, with the exit status that it must have."""
        done = self.node.datapath(self.state, verb, *arguments)
        assert done.returncode == status, f"{done.args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def json(self, verb: str, *arguments: str, status: int = 0) -> Any:
        """The result of a verb as a program reads it: standard output alone."""
        done = self.node.datapath(self.state, verb, *arguments, "--json")
        assert done.returncode == status, f"{done.args}: {done.returncode}\n{done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def apply(self, text: str, *, status: int = 0) -> str:
        return self.run("apply", self.policy(text), status=status)


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    with node(4) as made:
        yield User(made, tmp_path)


def test_apply_twice_status_and_teardown(user: User) -> None:
    assert "verified" in user.apply(TWO)
    assert user.changed() != ""
    settled = user.dump()
    assert "nothing to do" in user.apply(TWO)
    assert difference(settled, user.dump()) == ""
    assert "no drift" in user.run("status")
    user.run("teardown")
    assert user.changed() == ""
    assert "nothing to do" in user.run("teardown")
    assert "no policy is in force" in user.run("status")


def test_json_of_every_verb(user: User) -> None:
    policy = user.policy(ONE)
    applied = user.json("apply", policy)
    assert applied["changed"] is True
    assert applied["steps"]
    again = user.json("apply", policy)
    assert (again["changed"], again["steps"]) == (False, [])
    assert again["generation"] == applied["generation"]
    status = user.json("status")
    assert [network["name"] for network in status["networks"]] == ["public"]
    assert status["drift"] == []
    facts = user.json("facts")
    assert facts["ids"] == [{"name": "public", "fwmark": 0x10000, "table": 700001, "slot": 1, "zone": 0}]
    removed = user.json("teardown")
    assert removed["changed"] is True


def test_lost_state_directory_moves_no_id_and_needs_no_step(user: User) -> None:
    user.apply(TWO)
    settled = user.dump()
    shutil.rmtree(user.state)
    assert "nothing to do" in user.apply(TWO)
    assert difference(settled, user.dump()) == ""


def test_lost_state_directory_keeps_the_ids_of_those_who_stay(user: User) -> None:
    """`partners` has the second mark; alone on a new node it would get the first."""
    user.apply(TWO.replace("partners", "zz"))
    shutil.rmtree(user.state)
    user.apply(TWO.replace("partners", "zz").replace("public", "aa"))
    ids = {item["name"]: item["fwmark"] for item in user.json("facts")["ids"]}
    assert ids["zz"] == 0x20000


@pytest.mark.parametrize("moment", range(6))
def test_killed_apply_is_completed_or_undone(user: User, moment: int) -> None:
    """SIGKILL anywhere between the first look and the last step; then as if nothing had been."""
    started = user.node.namespace.argv(*datapath_argv(user.state, "apply", user.policy(TWO), "-v"))
    with subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # The log says where it is: more steps done before each next parameter.
        wanted = (0, 1, 4, 9, 13, 17)[moment]
        seen = 0
        for line in process.stderr:
            seen += "step_started" in line
            if seen >= wanted:
                break
        process.send_signal(signal.SIGKILL)
    assert process.returncode in {-signal.SIGKILL, 0}
    if moment % 2:
        user.apply(TWO)
        assert "no drift" in user.run("status")
    user.run("teardown")
    assert user.changed() == ""


def test_wrong_policy_touches_nothing(user: User) -> None:
    message = user.apply(ONE.replace("gateway", "gatway"), status=2)
    assert "policy.yaml:6:5" in message
    assert "gateway" in message
    assert user.changed() == ""
    user.apply(ONE)
    settled = user.dump()
    user.apply(ONE.replace("198.51.100.1", "192.0.2.1"), status=2)
    assert difference(settled, user.dump()) == ""


def refused(user: User, text: str, *named: str) -> None:
    """The apply fails, says who is in the way, and has changed nothing."""
    # A carrier that is lost shows in routes a little later.
    user.node.namespace.settle()
    standing = user.dump()
    message = user.apply(text, status=1)
    for name in named:
        assert name in message
    assert "nothing was changed" in message
    assert difference(standing, user.dump()) == ""


def test_missing_device(user: User) -> None:
    refused(user, ONE.replace("eth1", "eth9"), "there is no device eth9")


def test_device_that_is_down(user: User) -> None:
    user.node.namespace.ip(["link set eth1 down"])
    refused(user, ONE, "device eth1 is down", "ip link set eth1 up")


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_foreign_rule_inside_our_block(user: User, family: str) -> None:
    user.node.namespace.ip([f"{family} rule add priority 10004 to all lookup 77"])
    refused(user, ONE, f"`ip {family} rule 10004:", "lookup 77", "rules.priority")


@pytest.mark.parametrize("mark", ["0x20000/0x20000", "0x10000", "0x100/0xff0100"])
def test_foreign_rule_on_our_mark_bits(user: User, mark: str) -> None:
    user.node.namespace.ip([f"rule add priority 77 fwmark {mark} lookup 77"])
    refused(user, ONE, "ip -4 rule 77:", "0x0fff0000", "marks.mask")


def test_foreign_rule_on_other_mark_bits_is_no_conflict(user: User) -> None:
    user.node.namespace.ip(["rule add priority 77 fwmark 0x4000/0x4000 lookup 77"])
    assert "verified" in user.apply(ONE)


def test_foreign_nft_rule_that_sets_our_mark_bits(user: User) -> None:
    user.node.namespace.nft(
        "table ip other {\n chain mangle {\n"
        "  type filter hook prerouting priority -150\n  meta mark set 0x30000\n }\n}\n"
    )
    refused(user, ONE, "nft table ip other, chain mangle", "0x00030000")


@pytest.mark.parametrize("route", ["192.0.2.0/24 dev eth2", "-6 2001:db8:ff::/64 dev eth2"])
def test_foreign_route_in_our_table(user: User, route: str) -> None:
    option, _, rest = route.rpartition("-6 ")
    prefix = "-6 " if option or route.startswith("-6") else ""
    user.node.namespace.ip([f"{prefix}route add {rest} table 700001 proto bird"])
    refused(user, ONE, "routing table 700001 holds a route of somebody else", "bird", "pin `table`")


def test_foreign_filter_in_our_place(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(attachments.ENVIRONMENT, Hook.CLSACT)
    user.node.run("tc", "qdisc", "add", "dev", "eth1", "clsact")
    user.node.run(
        "tc", "filter", "add", "dev", "eth1", "ingress", "prio", "77", "handle", "0x6470", "bpf",
        "bytecode", "1,6 0 0 0,",
    )  # fmt: skip
    refused(user, ONE, "eth1", "filter")


DAMAGE = {
    "rule": (["ip", "rule", "del", "priority", "10004"], "add rule: -4 priority 10004"),
    "table": (["nft", "flush table inet datapath"], "nft transaction"),
    "no table": (["nft", "delete table inet datapath"], "nft transaction"),
    "element": (["nft", "flush set inet datapath ids"], "nft transaction"),
    "foreign rule in our chain": (["nft", "add rule inet datapath output accept"], "nft transaction"),
    "routes": (["ip", "route", "flush", "table", "700001"], "add route: -4"),
    "filter": (["tc", "filter", "del", "dev", "eth1", "ingress"], "eBPF program"),
    "qdisc": (["tc", "qdisc", "del", "dev", "eth1", "clsact"], "eBPF program"),
    "sysctl": (
        ["sysctl", "-w", "net.ipv4.conf.all.rp_filter=1"],
        "set net/ipv4/conf/all/rp_filter from 1 to 0",
    ),
    "strict arp": (["sysctl", "-w", "net.ipv4.conf.eth1.arp_ignore=0"], "set net/ipv4/conf/eth1/arp_ignore"),
}


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """Attached by a filter: that is what tc can take away."""
    with node(4) as made, pytest.MonkeyPatch.context() as patch:
        patch.setenv(attachments.ENVIRONMENT, Hook.CLSACT)
        user = User(made, tmp_path_factory.mktemp("user"))
        user.apply(ONE)
        yield user
        user.run("teardown")
        assert user.changed() == ""


@pytest.mark.kernel_feature("tcx")
def test_tcx_program_that_is_gone_is_drift_and_comes_back(user: User) -> None:
    user.apply(ONE)
    settled = user.dump()
    assert "eth1 ingress: datapath_in" in settled["tcx"]
    detach = "from datapath.kernel.bpf import attachments as a; a.detach('eth1')"
    user.node.run(sys.executable, "-c", detach)
    assert user.dump()["tcx"] == ""
    assert "eBPF program" in user.run("status", status=3)
    user.run("apply", user.policy(ONE))
    assert "attached by tcx" in user.run("status")
    assert _without_counters(difference(settled, user.dump())) == ""
    user.run("teardown")
    assert user.changed() == ""


@pytest.mark.kernel_feature("tcx")
def test_upgrade_from_a_filter_keeps_our_qdisc_until_its_network_goes(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an older version left: a filter on a clsact qdisc that it made, whose removal would drop packets."""
    with monkeypatch.context() as patch:
        patch.setenv(attachments.ENVIRONMENT, Hook.CLSACT)
        user.apply(ONE)
        assert "clsact" in user.node.run("tc", "qdisc", "show", "dev", "eth1")
    assert user.json("status", status=3)["drift"] == ["eBPF program for 1 network(s) on eth1"]
    user.apply(ONE)
    assert "no drift" in user.run("status")
    assert "bpf" not in user.node.run("tc", "filter", "show", "dev", "eth1", "ingress")
    assert "clsact" in user.node.run("tc", "qdisc", "show", "dev", "eth1")
    user.run("teardown")
    assert user.changed() == ""


@pytest.mark.parametrize("what", DAMAGE)
def test_drift_is_named_and_healed(damaged: User, what: str) -> None:
    command, named = DAMAGE[what]
    settled = damaged.dump()
    damaged.node.run(*command)
    assert difference(settled, damaged.dump()) != ""
    message = damaged.run("status", status=3)
    assert "drift" in message
    assert named in message
    damaged.run("apply", damaged.policy(ONE))
    assert "no drift" in damaged.run("status")
    assert _without_counters(difference(settled, damaged.dump())) == ""


def _without_counters(text: str) -> str:
    """A program that was loaded again has another id; a list that was filled again has another order."""
    sections = [s for s in text.split("\n---") if s.strip()]
    kept = [
        s
        for s in sections
        if not any(word in s for word in ("filters before", "programs before", "nft before"))
    ]
    return "\n---".join(kept)


def entry(user: User, source: str, mark: int) -> None:
    user.node.run(
        "conntrack", "-I", "-p", "tcp", "-s", source, "-d", "203.0.113.7", "--sport", "4000", "--dport", "80",
        "--state", "ESTABLISHED", "-t", "600", "--mark", hex(mark),
    )  # fmt: skip


def entries(user: User) -> set[str]:
    lines = user.node.run("conntrack", "-L").splitlines()
    return {line.split("src=")[1].split()[0] for line in lines if "src=" in line}


@pytest.mark.parametrize("state", ["kept", "lost"])
def test_connections_of_a_removed_network_are_forgotten_and_only_those(user: User, state: str) -> None:
    user.apply(TWO)
    # Ids go by name: `partners` has the first mark, `public` the second.
    gone, stays = 0x10000, 0x20000
    marks = {
        "192.0.2.1": gone,
        "192.0.2.2": gone | 0x4001,  # with bits of others
        "192.0.2.3": stays,
        "192.0.2.4": 0x4001,
        "192.0.2.5": 0,
        "192.0.2.6": gone | stays,  # shares a bit, is not equal
    }
    for source, mark in marks.items():
        entry(user, source, mark)
    assert entries(user) == set(marks)
    if state == "lost":
        shutil.rmtree(user.state)
    user.apply(ONE)
    assert entries(user) == {"192.0.2.3", "192.0.2.4", "192.0.2.5", "192.0.2.6"}


def test_dry_run_changes_nothing_and_shows_what_would_change(user: User) -> None:
    policy = user.policy(ONE)
    argv = [datapath_argv(user.state, "")[1].removesuffix("datapath") + "nft-dry-run"]
    state = ["--state-dir", str(user.state)]

    def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = user.node.namespace.argv(*argv, *arguments, *state)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    shown = dry_run(policy)
    assert shown.returncode == 0, shown.stderr
    assert "add rule inet datapath prerouting" in shown.stdout
    assert "accepted by this kernel's verifier" in shown.stdout
    assert dry_run("--exit-code", policy).returncode == 3
    assert json.loads(dry_run("--json", policy).stdout)["changes"]
    assert user.changed() == ""
    user.apply(ONE)
    settled = user.dump()
    again = dry_run("--exit-code", policy)
    assert again.returncode == 0
    assert "nothing would change" in again.stdout
    assert dry_run(user.policy(ONE.replace("vips", "vip"))).returncode == 2
    assert difference(settled, user.dump()) == ""
