# SPDX-License-Identifier: Apache-2.0
"""The life of the package on a Debian 12: installed, used, upgraded under a policy, removed, purged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath import __version__
from tests.packaging.deb.chroot import Chroot
from tests.service.daemon import FIRST, policy
from tests.sources import REPOSITORY
from tools.deb.build import build
from tools.deb.control import CONFFILES

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow, pytest.mark.timeout(900)]

LATER = f"{__version__}-2"
POLICY = "/etc/datapath/policy.yaml"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One version and the next."""
    folder = tmp_path_factory.mktemp("deb")
    return build(folder, f"{__version__}-1"), build(folder, LATER)


@pytest.fixture
def debian(tmp_path: Path) -> Iterator[Chroot]:
    made = Chroot(tmp_path / "root")
    yield made
    made.close()


def _installed_and_at_work(debian: Chroot, package: Path) -> None:
    debian.install(package)
    assert debian.run("datapath", "--version") == f"datapath {__version__}\n"
    assert debian.run("dpkg", "--verify", "datapath") == ""
    case = REPOSITORY / "rulesets/case-4-conntrack"
    for name in ("policy.yaml", "facts.yaml"):
        (debian.root / "srv" / name).write_bytes((case / name).read_bytes())
    plan = debian.run("datapath", "compile", "/srv/policy.yaml", "--facts", "/srv/facts.yaml")
    assert plan == (case / "expected.plan").read_text()
    (debian.root / POLICY[1:]).write_text(policy(FIRST, backend="ebpf"))
    debian.run("nft-dry-run", "--exit-code", POLICY, status=3)
    debian.run("datapath", "apply", POLICY)
    assert "no drift" in debian.run("datapath", "status")


def _is_enabled(debian: Chroot, unit: str) -> bool:
    return (debian.root / "etc/systemd/system/multi-user.target.wants" / unit).is_symlink()


def test_install_upgrade_remove_purge(debian: Chroot, packages: tuple[Path, Path]) -> None:
    files, network = debian.files(), debian.network()

    _installed_and_at_work(debian, packages[0])
    assert _is_enabled(debian, "datapath.service")
    assert _is_enabled(debian, "datapath-restore.service")
    assert (debian.root / "run/datapath").readlink() == Path("/var/lib/datapath")
    at_work = debian.network()
    assert at_work != network

    debian.install(packages[1])
    assert LATER in debian.run("dpkg-query", "-W", "datapath")
    assert debian.network() == at_work
    status = json.loads(debian.run("datapath", "status", "--json"))
    assert status["drift"] == []

    debian.run("apt-get", "remove", "-y", "-q", "datapath")
    assert debian.network() == network
    left = debian.files() - files
    assert {name[1:] for name in CONFFILES} <= left
    assert not [name for name in left if name.startswith("usr/")]

    debian.run("apt-get", "purge", "-y", "-q", "datapath")
    assert debian.files() - files == set()
    assert files - debian.files() == set()


def test_an_administrator_who_disabled_it_keeps_it_disabled(
    debian: Chroot, packages: tuple[Path, Path]
) -> None:
    debian.install(packages[0])
    debian.run("systemctl", "disable", "datapath.service")
    debian.install(packages[1])
    assert not _is_enabled(debian, "datapath.service")
    assert _is_enabled(debian, "datapath-restore.service")


def test_the_package_names_no_path_of_the_machine_that_built_it(
    debian: Chroot, packages: tuple[Path, Path]
) -> None:
    debian.install(packages[0])
    names = debian.run("dpkg", "-L", "datapath").split()
    paths = [path for name in names if (path := debian.root / name[1:]).is_file() and not path.is_symlink()]
    assert len(paths) > 500
    needle = str(REPOSITORY).encode()
    assert [str(path) for path in paths if needle in path.read_bytes()] == []
