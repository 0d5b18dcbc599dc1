# SPDX-License-Identifier: Apache-2.0
"""The life of a daemon: policy files, signals, one instance, the service manager."""

from __future__ import annotations

import json
import signal
import socket
import threading
import urllib.request
from pathlib import Path

import pytest

from tests.service.daemon import FIRST, PATIENCE_S, SECOND, Daemon, Node, network, policy, wait_until
from tests.sources import REPOSITORY

pytestmark = pytest.mark.root

_BAD = "version: 1\nnetworks:\n  - nam: first\n"


def _status(node: Node) -> dict[str, object]:
    document: dict[str, object] = json.loads(node.datapath("status", "--json").stdout)
    return document


def _names(node: Node) -> list[str]:
    found = _status(node).get("networks")
    assert isinstance(found, list)
    return [item["name"] for item in found]


def test_saved_policy_is_applied_whichever_way_it_is_saved(node: Node) -> None:
    with Daemon(node) as daemon:
        daemon.started()
        node.policy.write_text(policy(FIRST))
        daemon.wait_for("policy_in_force", 2)
        assert _names(node) == ["first"]
        new = node.policy.with_suffix(".tmp")
        new.write_text(policy(FIRST, SECOND))
        new.rename(node.policy)
        daemon.wait_for("policy_in_force", 3)
        assert _names(node) == ["first", "second"]
        node.policy.unlink()
        daemon.wait_for("policy_rejected")
        node.policy.write_text(policy(SECOND))
        daemon.wait_for("policy_in_force", 4)
        assert _names(node) == ["second"]


def test_policy_behind_a_swapped_link_as_in_a_config_map(node: Node) -> None:
    for version, text in (("one", policy(FIRST)), ("two", policy(FIRST, SECOND))):
        (node.folder / version).mkdir()
        (node.folder / version / "policy.yaml").write_text(text)
    (node.folder / "..data").symlink_to("one")
    node.policy.unlink()
    node.policy.symlink_to("..data/policy.yaml")
    with Daemon(node) as daemon:
        daemon.started()
        (node.folder / "..new").symlink_to("two")
        (node.folder / "..new").rename(node.folder / "..data")
        daemon.wait_for("policy_in_force", 2)
        assert _names(node) == ["first", "second"]


def test_drop_ins_add_networks(node: Node) -> None:
    drop_ins = node.folder / "policy.d"
    drop_ins.mkdir()
    node.policy.write_text(policy(FIRST))
    with Daemon(node, "--policy-dir", str(drop_ins)) as daemon:
        daemon.started()
        (drop_ins / "10-second.yaml").write_text("version: 1\nnetworks:\n" + SECOND)
        daemon.wait_for("policy_in_force", 2)
        assert _names(node) == ["first", "second"]
        (drop_ins / "10-second.yaml").unlink()
        daemon.wait_for("policy_in_force", 3)
        assert _names(node) == ["first"]


def test_bad_policy_keeps_the_old_one_also_over_a_restart(node: Node) -> None:
    with Daemon(node) as daemon:
        daemon.started()
        before = node.snapshot()
        node.policy.write_text(_BAD)
        assert f"{node.policy}:3:5" in daemon.wait_for("policy_rejected")["error"]
        assert node.snapshot() == before
        assert daemon.stop() == 0
    with Daemon(node) as again:
        again.started()
        again.wait_for("policy_rejected")
        node.ns.nft("flush ruleset")
        again.wait_for("drift_healed")
        wait_until(lambda: node.has(before), "the last good policy is healed")


def test_bad_policy_on_a_fresh_node_ends_the_start(node: Node) -> None:
    node.policy.write_text(_BAD)
    with Daemon(node) as daemon:
        assert daemon.process.wait(PATIENCE_S) == 2
        assert "policy.yaml:3:5" in daemon.log_path.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_of_the_daemon_is_not_the_end_of_the_datapath(node: Node, number: int) -> None:
    with Daemon(node) as daemon:
        daemon.started()
        before = node.snapshot()
        assert daemon.stop(number) == 0
        assert node.snapshot() == before
        assert "datapath" in before["table"]


def test_sighup_puts_the_files_in_force_again(node: Node) -> None:
    other = node.folder / "other" / "other.yaml"
    other.parent.mkdir()
    other.write_text(policy(FIRST))
    with Daemon(node) as daemon:
        daemon.started()
        assert node.datapath("apply", str(other)).returncode == 0
        node.ns.nft("flush ruleset")
        daemon.wait_for("drift_healed")
        assert _names(node) == ["first"], "what a person applied is what is healed"
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for("policy_in_force", 2)
        assert _names(node) == ["first", "second"]


def test_a_rollback_survives_a_restart_of_the_daemon(node: Node) -> None:
    node.policy.write_text(policy(FIRST))
    with Daemon(node) as daemon:
        daemon.started()
        node.policy.write_text(policy(FIRST, SECOND))
        daemon.wait_for("policy_in_force", 2)
        assert node.datapath("rollback").returncode == 0
        assert _names(node) == ["first"]
        daemon.stop()
    with Daemon(node) as again:
        again.started()
        again.wait_for("policy_differs_from_files")
        assert _names(node) == ["first"]


def test_teardown_is_not_healed(node: Node) -> None:
    with Daemon(node) as daemon:
        daemon.started()
        assert node.datapath("teardown").returncode == 0
        node.ns.nft("add table inet foreign")
        assert not daemon.events("drift_healed")
        assert _status(node) == {"policy": None}
        assert "datapath" not in node.snapshot()["table"]
        node.policy.write_text(policy(FIRST))
        daemon.wait_for("policy_in_force", 2)


def test_journal_lines_carry_their_priority(node: Node) -> None:
    with Daemon(node, environment={"JOURNAL_STREAM": "8:1"}) as daemon:
        daemon.started()
        node.ns.nft("flush ruleset")
        daemon.wait_for("drift_healed")
        lines = daemon.log_path.read_text().splitlines()
    assert all(line.startswith(("<4>{", "<6>{")) for line in lines), lines
    assert any(line.startswith("<4>") and "drift_healed" in line for line in lines)


def test_one_daemon_a_state_directory(node: Node) -> None:
    with Daemon(node) as daemon:
        daemon.started()
        with Daemon(node) as second:
            assert second.process.wait(PATIENCE_S) == 1
            assert "another datapath process" in second.log_path.read_text()


def test_network_whose_device_comes_later(node: Node) -> None:
    node.policy.write_text(policy(FIRST, network("later", "eth7", 117)))
    with Daemon(node) as daemon:
        daemon.started()
        assert daemon.wait_for("networks_waiting")["networks"] == ["later"]
        assert "eth0" in node.snapshot()["routes"]
        node.add_device("eth7")
        daemon.wait_for("networks_complete")
        wait_until(lambda: "eth7" in node.snapshot()["routes"], "the late device is served")


def test_a_storm_is_one_repair(node: Node) -> None:
    with Daemon(node) as daemon:
        daemon.started()
        before = node.snapshot()
        lines = ["rule flush protocol 78", "-6 rule flush protocol 78"]
        for _ in range(100):
            lines += ["addr add 198.51.100.9/32 dev eth1", "addr del 198.51.100.9/32 dev eth1"]
        node.ns.ip(lines)
        daemon.wait_for("drift_healed")
        wait_until(lambda: node.has(before), "as before")
        assert len(daemon.events("drift_healed")) < 20, "203 events, a few repairs"


def test_a_fight_is_named_and_slowed_down(node: Node) -> None:
    stop = threading.Event()
    with Daemon(node) as daemon:
        daemon.started()
        before = node.snapshot()

        def fight() -> None:
            for _ in range(2000):
                if stop.is_set():
                    return
                node.ns.run("nft", "add table inet datapath; delete table inet datapath")
                # Often enough to meet every repair, seldom enough to leave the daemon a processor.
                stop.wait(0.1)

        fighter = threading.Thread(target=fight)
        fighter.start()
        try:
            event = daemon.wait_for("drift_contested", 3)
        finally:
            stop.set()
            fighter.join()
        assert event["what"] == "nft"
        assert any(by.startswith("nft[") for by in event["by"])
        delays = [item["next_attempt_in_s"] for item in daemon.events("drift_contested")]
        assert delays[:3] == [0.5, 1.0, 2.0]
        wait_until(lambda: node.has(before), "peace, and it goes on trying")


def test_what_the_service_manager_hears(node: Node) -> None:
    path = node.folder / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(PATIENCE_S)
        environment = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "400000"}
        with Daemon(node, environment=environment) as daemon:
            heard = _hear_until(manager, "READY=1")
            assert "generation 1, 2 network(s)" in heard[-1]
            for _ in range(3):
                _hear_until(manager, "WATCHDOG=1")
            daemon.process.send_signal(signal.SIGHUP)
            assert "MONOTONIC_USEC=" in _hear_until(manager, "RELOADING=1")[-1]
            _hear_until(manager, "READY=1")
            daemon.process.send_signal(signal.SIGTERM)
            _hear_until(manager, "STOPPING=1")


def test_the_watchdog_starves_while_nothing_can_be_reconciled(node: Node) -> None:
    address = f"\0datapath-test-{node.ns.name}"
    with node.ns.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(PATIENCE_S)
        environment = {"NOTIFY_SOCKET": "@" + address[1:], "WATCHDOG_USEC": "200000"}
        with Daemon(node, environment=environment) as daemon:
            _hear_until(manager, "WATCHDOG=1")
            state = node.state / "state.json"
            good = state.read_text()
            state.write_text("{")
            node.ns.nft("flush ruleset")
            daemon.wait_for("reconcile_failed")
            manager.settimeout(1)
            with pytest.raises(TimeoutError):
                _hear_until(manager, "nothing that anybody says")
            manager.settimeout(PATIENCE_S)
            state.write_text(good)
            _hear_until(manager, "WATCHDOG=1")
            daemon.wait_for("drift_healed")


def _hear_until(manager: socket.socket, what: str) -> list[str]:
    heard: list[str] = []
    for _ in range(200):
        heard.append(manager.recv(4096).decode())
        if what in heard[-1]:
            return heard
    raise AssertionError(f"never heard {what}: {heard}")


def _scrape(node: Node, port: int) -> str:
    def get() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as answer:
            body: bytes = answer.read()
        return body.decode()

    return node.ns.call(get)


def test_metrics_and_the_dashboard_speak_of_the_same(node: Node) -> None:
    with Daemon(node, "--metrics", "127.0.0.1:9479") as daemon:
        daemon.started()
        node.ns.nft("flush ruleset")
        daemon.wait_for("drift_healed")
        text = _scrape(node, 9479)
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert values["datapath_generation"] == "1.0"
        assert values['datapath_drift_events_total{kind="nft"}'] == "1.0"
        assert values["datapath_heal_duration_seconds_count"] == "1.0"
        assert values['datapath_network_packets_total{network="first"}']
        assert 'datapath_network_dropped_packets_total{network="first",reason="spoofed"}' in values
        node.policy.write_text(_BAD)
        daemon.wait_for("policy_rejected")
        assert "datapath_policy_rejected 1.0" in _scrape(node, 9479)
    exported = {name.partition("{")[0] for name in values}
    dashboard = json.loads((REPOSITORY / "packaging/grafana/datapath.json").read_text())
    asked = {name for expression in _expressions(dashboard) for name in _metric_names(expression)}
    assert asked
    assert asked <= exported, asked - exported


def _expressions(dashboard: dict[str, object]) -> list[str]:
    panels = dashboard["panels"]
    assert isinstance(panels, list)
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def _metric_names(expression: str) -> set[str]:
    words = "".join(c if c.isalnum() or c == "_" else " " for c in expression).split()
    return {word for word in words if word.startswith("datapath_")}


def test_metrics_on_a_unix_socket_and_nowhere_else(node: Node) -> None:
    path = Path(node.folder / "metrics.sock")
    with Daemon(node, "--metrics", f"unix:{path}") as daemon:
        daemon.started()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(PATIENCE_S)
            client.connect(str(path))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            answer = b""
            while data := client.recv(65_536):
                answer += data
        assert b"200 OK" in answer
        assert b'datapath_network_waiting{network="first"} 0.0' in answer
    with Daemon(node, "--metrics", "192.0.2.1:80") as refused:
        assert refused.process.wait(PATIENCE_S) == 2
