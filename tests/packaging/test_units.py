# SPDX-License-Identifier: Apache-2.0
"""The unit files: what systemd makes of them, and how far they open the host. No service manager runs for it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.sources import REPOSITORY
from tools.deb.control import DEPENDS

UNITS = REPOSITORY / "packaging/systemd"
NAMES = ("datapath.service", "datapath-restore.service")
#: Tenths: `systemd-analyze security` calls up to 2.5 "OK".
EXPOSURE_MAX = 25


def _settings(name: str) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for line in (UNITS / name).read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found[key] += value.split()
    return found


def test_all_units_are_looked_at() -> None:
    assert {path.name for path in UNITS.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_exposure(name: str) -> None:
    done = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--no-pager"),
            *(f"--threshold={EXPOSURE_MAX}", str(UNITS / name)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Overall exposure level" in done.stdout
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_systemd_knows_every_setting(name: str, tmp_path: Path) -> None:
    """A misspelt key is only a warning at boot; here it is an error."""
    # The program is not installed here, and its absence is not what is tested.
    text = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", (UNITS / name).read_text(), flags=re.MULTILINE)
    (tmp_path / name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_both_units_are_confined_alike() -> None:
    daemon, restore = (_settings(name) for name in NAMES)
    confining = re.compile(
        r"Capabil|Protect|Private|Restrict|SystemCall|Memory|Lock|NoNew|Device|IPAddr|Keyring"
    )
    keys = {key for key in (*daemon, *restore) if confining.match(key)} - {"ProtectProc", "MemoryMax"}
    assert len(keys) > 20
    assert {key: daemon[key] for key in keys} == {key: restore[key] for key in keys}


def test_stopping_does_not_tear_down() -> None:
    for name in NAMES:
        assert not {"ExecStop", "ExecStopPost"} & set(_settings(name))


def test_order_at_boot() -> None:
    daemon, restore = (_settings(name) for name in NAMES)
    assert "network-pre.target" in restore["Before"]
    assert "datapath-restore.service" in daemon["After"]
    assert {"network-online.target", "kubelet.service"} <= set(daemon["Before"])
    # Debian's unit flushes all of nftables when it starts.
    assert "nftables.service" in restore["After"]
    assert "systemd-sysctl.service" in restore["After"]


def test_the_package_depends_on_what_a_node_needs() -> None:
    """ExecReload is /bin/kill of procps, which a minimal Debian lacks; lane `run` has all such things."""
    lines = (REPOSITORY / "tools/setup/packages.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(maxsplit=2) for line in lines if line and not line.startswith("#")]
    needed = {row[0] for row in rows if row[1] == "run"} - {"python3-venv"}
    assert "procps" in needed
    assert needed <= {dependency.split()[0] for dependency in DEPENDS}


def test_maintainer_scripts_are_shell() -> None:
    shell = shutil.which("sh")
    assert shell is not None
    scripts = [path for path in (REPOSITORY / "packaging/debian").iterdir() if path.name != "copyright"]
    assert len(scripts) == 3
    for path in scripts:
        done = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert path.read_text().splitlines()[2] == "set -e"
