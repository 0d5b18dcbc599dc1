# SPDX-License-Identifier: Apache-2.0
"""`make test-systemd`: the installed package under a real systemd and systemd-networkd, in a virtual machine.

The image is made by mmdebstrap and `mkfs.ext4 -d`: nothing is mounted on this machine. `guest.py` does the work inside.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from datapath import __version__
from tools.deb.build import REPOSITORY, build
from tools.deb.control import DEPENDS

_CACHE: Final = REPOSITORY / ".cache/deb/bookworm-vm.tar"
_PACKAGES: Final = (
    "systemd",
    "systemd-sysv",
    "udev",
    "dbus",
    "linux-image-cloud-amd64",
    "initramfs-tools",
    "iputils-ping",
)
_BUILD_TIMEOUT_S: Final = 900
_RUN_TIMEOUT_S: Final = 1800
_STAGES: Final = 2
_STAGE_BYTES: Final = 65536

POLICY: Final = """\
version: 1
networks:
  - name: public
    interface: vip0
    vips: [198.51.100.0/24, "2001:db8:1::/64"]
    gateway: [198.51.100.1, "2001:db8:1::1"]
"""
#: The VIPs are addresses of the node; its default route leads where nobody is.
_FILES: Final = {
    "etc/datapath/policy.yaml": POLICY,
    "etc/systemd/network/10-vip.netdev": "[NetDev]\nName=vip0\nKind=veth\n[Peer]\nName=vip0-peer\n",
    "etc/systemd/network/10-up.netdev": "[NetDev]\nName=up0\nKind=dummy\n",
    "etc/systemd/network/20-vip.network": (
        "[Match]\nName=vip0\n[Network]\nLinkLocalAddressing=ipv6\nIPv6AcceptRA=no\n[Link]\nRequiredForOnline=no\n"
    ),
    "etc/systemd/network/20-up.network": (
        "[Match]\nName=up0\n[Network]\nIPv6AcceptRA=no\nAddress=10.0.0.2/24\nAddress=2001:db8:2::2/64\n"
        "Address=198.51.100.10/32\nAddress=2001:db8:1::10/128\nGateway=10.0.0.1\nGateway=2001:db8:2::1\n"
    ),
    "etc/systemd/system/datapath-check.service": (
        "[Unit]\nAfter=multi-user.target network-online.target\nWants=network-online.target\n"
        "[Service]\nType=simple\nExecStart=/usr/bin/python3 /srv/guest.py\n"
        "StandardOutput=journal+console\nStandardError=journal+console\n"
        "[Install]\nWantedBy=graphical.target\n"
    ),
    "etc/hostname": "node\n",
}


def _base() -> Path:
    """A Debian with a kernel and all that the package depends on; made once and kept."""
    if not _CACHE.exists():
        _CACHE.parent.mkdir(parents=True, exist_ok=True)
        names = sorted({dependency.split()[0] for dependency in DEPENDS} | set(_PACKAGES))
        unfinished = _CACHE.with_suffix(".new.tar")
        argv = ["mmdebstrap", "--quiet", "--variant=minbase", "--format=tar"]
        argv += ['--aptopt=Acquire::Languages "none"', f"--include={','.join(names)}"]
        subprocess.run([*argv, "bookworm", str(unfinished)], check=True, timeout=_BUILD_TIMEOUT_S)
        unfinished.rename(_CACHE)
    return _CACHE


def _image(folder: Path) -> Path:
    root = folder / "root"
    root.mkdir()
    subprocess.run(["tar", "-C", str(root), "-xf", str(_base())], check=True)
    for number in (1, 2):
        build(root / "srv", f"{__version__}-{number}")
    shutil.copyfile(Path(__file__).with_name("guest.py"), root / "srv/guest.py")
    first = f"/srv/datapath_{__version__}-1_amd64.deb"
    # In a namespace of its own: maintainer scripts must not see the network of this machine.
    subprocess.run(["unshare", "--net", "chroot", str(root), "dpkg", "-i", first], check=True)
    for name, text in _FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    units = ("systemd-networkd", "systemd-networkd-wait-online", "datapath-check")
    subprocess.run(["chroot", str(root), "systemctl", "enable", "--quiet", *units], check=True)
    for kind in ("vmlinuz", "initrd.img"):
        (found,) = (root / "boot").glob(f"{kind}-*")
        shutil.copyfile(found, folder / kind)
    disk = folder / "disk"
    with disk.open("wb") as file:
        file.truncate(3 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-d", str(root), str(disk)], check=True)
    shutil.rmtree(root)
    return disk


def _boot(folder: Path, disk: Path, log: Path) -> None:
    results = folder / "results"
    results.write_bytes(bytes(_STAGES * _STAGE_BYTES))
    argv = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "1536", "-smp", "2"]
    argv += ["-nographic", "-nodefaults", "-serial", f"file:{log}", "-nic", "none"]
    argv += ["-kernel", str(folder / "vmlinuz"), "-initrd", str(folder / "initrd.img")]
    argv += ["-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet systemd.show_status=no"]
    for path in (disk, results):
        argv += ["-drive", f"file={path},format=raw,if=virtio"]
    subprocess.run(argv, check=True, timeout=_RUN_TIMEOUT_S)


def _results(folder: Path) -> list[dict[str, Any]]:
    data = (folder / "results").read_bytes()
    found: list[dict[str, Any]] = []
    for stage in range(_STAGES):
        part = data[stage * _STAGE_BYTES : (stage + 1) * _STAGE_BYTES].rstrip(b"\0")
        found += [json.loads(line) for line in part.splitlines()]
    return found


def main() -> int:
    """Build, boot, print what the guest found; 1 where something is not as it must be."""
    parser = argparse.ArgumentParser(prog="tools.deb.vm", description=__doc__)
    parser.add_argument("--log", type=Path, default=REPOSITORY / ".cache/deb/console.log", help="the console")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="datapath-systemd-") as name:
        folder = Path(name)
        disk = _image(folder)
        try:
            _boot(folder, disk, arguments.log)
        except subprocess.TimeoutExpired:
            print(f"the machine did not end within {_RUN_TIMEOUT_S} s; its console: {arguments.log}")
        results = _results(folder)
    for result in results:
        figures = {key: value for key, value in result.items() if key not in ("check", "good")}
        print(f"{'ok  ' if result['good'] else 'FAIL'} {result['check']}: {json.dumps(figures)}")
    is_complete = bool(results) and results[-1]["check"] == "end"
    if not is_complete:
        print(f"not all was done; the console: {arguments.log}")
    return 0 if is_complete and all(result["good"] for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
