# SPDX-License-Identifier: Apache-2.0
"""What `datapath doctor` makes of nodes that cannot be had in a test: full tables, lesser kernels, files of others."""

from __future__ import annotations

import dataclasses
import fcntl
import os
from pathlib import Path

import pytest

from datapath.kernel.features import probe_features
from datapath.kernel.host import DirectoryView, HostView, lock_holder
from datapath.kernel.networkd import Networkd, config_files, read_settings
from datapath.observe.doctor_host import _FEATURES, check_host
from datapath.observe.findings import Finding, Report, Severity, fail, ok, warn

_WELL = HostView(DirectoryView("/run/datapath"), features=dict.fromkeys(_FEATURES, ""))


def _worst(host: HostView, check: str, *, uses_rules: bool = False) -> Finding:
    order = [Severity.OK, Severity.WARN, Severity.FAIL]
    found = [item for item in check_host(host, uses_rules=uses_rules) if item.check == check]
    return max(found, key=lambda item: order.index(item.severity))


def test_a_node_that_is_well_has_nothing_but_ok() -> None:
    assert {item.severity for item in check_host(_WELL, uses_rules=True)} == {Severity.OK}


@pytest.mark.parametrize(
    ("count", "most", "severity"),
    [(0, 100, "ok"), (79, 100, "ok"), (80, 100, "warn"), (99, 100, "warn"), (100, 100, "fail"), (7, 0, "ok")],
)
def test_conntrack_fills_up(count: int, most: int, severity: str) -> None:
    host = dataclasses.replace(_WELL, conntrack=(count, most))
    assert _worst(host, "conntrack").severity == severity


@pytest.mark.parametrize(
    ("name", "is_needed"), [(name, needed) for name, (needed, _, _) in _FEATURES.items()]
)
def test_each_missing_feature_says_what_is_lost(name: str, is_needed: bool) -> None:
    host = dataclasses.replace(_WELL, features={**_WELL.features, name: "Error: No such file or directory"})
    finding = _worst(host, f"kernel: {name}")
    assert finding.severity == ("fail" if is_needed else "warn")
    assert finding.matters
    assert finding.remedy


@pytest.mark.root
@pytest.mark.bpf
def test_every_feature_that_is_tried_has_its_consequence() -> None:
    assert set(probe_features()) == set(_FEATURES)


@pytest.mark.parametrize(
    ("free", "severity"), [(0, "fail"), (65_535, "fail"), (65_536, "warn"), (8 << 20, "ok")]
)
def test_room_in_the_state_directory(free: int, severity: str) -> None:
    host = dataclasses.replace(_WELL, directory=DirectoryView("/run/datapath", free_bytes=free))
    assert _worst(host, "state directory").severity == severity


@pytest.mark.parametrize("uses_rules", [True, False])
def test_networkd_that_deletes_is_worse_where_rules_are_in_force(uses_rules: bool) -> None:
    manages = {"ManageForeignRoutingPolicyRules": (False, "f"), "ManageForeignRoutes": (True, "the default")}
    host = dataclasses.replace(_WELL, networkd=Networkd(7, manages))
    finding = _worst(host, "systemd-networkd", uses_rules=uses_rules)
    assert finding.severity == ("fail" if uses_rules else "warn")
    assert "ManageForeignRoutes=yes (the default)" in finding.seen
    assert "RoutingPolicyRules" not in finding.seen


def _write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _rules(root: Path) -> bool:
    return read_settings(root)["ManageForeignRoutingPolicyRules"][0]


def test_networkd_configuration_is_merged_as_systemd_does(tmp_path: Path) -> None:
    """systemd.conf.d(5) and networkd.conf(5): each step overrides the ones before."""
    off, on = (
        "[Network]\nManageForeignRoutingPolicyRules=no\n",
        "[Network]\nManageForeignRoutingPolicyRules=YES\n",
    )
    usr, etc = "usr/lib/systemd/networkd.conf", "etc/systemd/networkd.conf"
    assert _rules(tmp_path), "the default"
    _write(tmp_path, usr, off)
    assert not _rules(tmp_path)
    _write(tmp_path, etc, "[Network]\n#ManageForeignRoutingPolicyRules=no\n")
    assert _rules(tmp_path), "the one in /etc replaces the whole file in /usr"
    _write(tmp_path, f"{usr}.d/50-datapath.conf", off)
    assert not _rules(tmp_path), "drop-ins come after the file"
    _write(tmp_path, f"{etc}.d/40-x.conf", on)
    assert not _rules(tmp_path), "in the order of their names, wherever they are"
    _write(tmp_path, f"{etc}.d/60-x.conf", on)
    assert _rules(tmp_path)
    (tmp_path / f"{etc}.d/60-x.conf").unlink()
    _write(tmp_path, f"{etc}.d/50-datapath.conf", "")
    assert _rules(tmp_path), "an empty file of the same name in /etc switches the other off"
    (tmp_path / f"{etc}.d/50-datapath.conf").unlink()
    (tmp_path / f"{etc}.d/50-datapath.conf").symlink_to("/dev/null")
    assert _rules(tmp_path), "so does a link to /dev/null"
    assert [path.name for path in config_files(tmp_path)] == ["networkd.conf", "40-x.conf"]


def test_only_the_right_section_and_values_count(tmp_path: Path) -> None:
    name = "etc/systemd/networkd.conf.d/a.conf"
    for text in (
        "ManageForeignRoutingPolicyRules=no\n",
        "[DHCPv4]\nManageForeignRoutingPolicyRules=no\n",
        "[Network]\nManageForeignRoutingPolicyRules=perhaps\n",
        "[Network]\n; ManageForeignRoutingPolicyRules=no\n",
    ):
        _write(tmp_path, name, text)
        assert _rules(tmp_path), text
    _write(tmp_path, name, "[Network]\n ManageForeignRoutingPolicyRules = off \n")
    assert not _rules(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe")
    assert _rules(tmp_path), "what is no text says nothing"


def test_lock_holder_is_found_without_touching_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert lock_holder(path) is None
    path.write_text("")
    assert lock_holder(path) is None
    with path.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert lock_holder(path) == os.getpid()
    assert lock_holder(path) is None


def test_report_fails_only_for_failures() -> None:
    assert not Report((ok("a", "b"), warn("a", "b", "c", "d"))).has_failed
    report = Report((ok("a", "b"), fail("x", "b", "c", "d")))
    assert report.has_failed
    assert report.render().endswith("1 ok, 0 warn, 1 fail")
    assert report.as_json()["ok"] is False
