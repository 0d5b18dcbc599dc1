# SPDX-License-Identifier: Apache-2.0
"""`make test-systemd`: the installed package under a real systemd and systemd-networkd, in a virtual machine.

`guest.py` does the work inside; this starts the machine, shows what it tells while it runs, and judges.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from tools.deb.build import REPOSITORY, BuildError
from tools.deb.image import Image, make_image
from tools.deb.topology import NIC_MACS

_TIMEOUT_S: Final = 840.0
_POLL_S: Final = 0.5
_COLUMNS: Final = (
    ("sent", "sent"),
    ("lost", "lost"),
    ("wrong_way", "wrong way"),
    ("stuck", "stuck"),
    ("outage_ms", "outage ms"),
    ("repairs", "repairs"),
    ("repair_ms", "repair ms"),
)


def _command(image: Image, console: Path, results: Path) -> list[str]:
    # Emulation only: the lane must mean the same where there is no /dev/kvm.
    argv = ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", "1536", "-smp", "2"]
    argv += ["-nographic", "-nodefaults", "-monitor", "none"]
    argv += ["-serial", f"file:{console}", "-serial", f"file:{results}"]
    argv += ["-kernel", str(image.kernel), "-initrd", str(image.initrd)]
    # Without the mitigations emulation is much faster; nobody else is in this machine.
    options = "mitigations=off net.ifnames=0 quiet systemd.show_status=no"
    argv += ["-append", f"root=/dev/vda rw console=ttyS0 {options}"]
    argv += ["-drive", f"file={image.disk},format=raw,if=virtio,cache=unsafe"]
    # Two cards and a cable between them: the machine has no way out.
    for number, mac in enumerate(NIC_MACS):
        argv += ["-netdev", f"hubport,id=port{number},hubid=0"]
        argv += ["-device", f"virtio-net-pci,netdev=port{number},mac={mac},romfile="]
    return argv


def _documents(results: Path, known: int) -> list[dict[str, Any]]:
    """Those after the first `known`; the last line may be unfinished."""
    lines = results.read_bytes().split(b"\n")[:-1] if results.exists() else []
    return [json.loads(line) for line in lines[known:]]


def _boot(image: Image, folder: Path, console: Path, timeout_s: float) -> list[dict[str, Any]]:
    """Run the machine until it is off, or for as long as it may; what it told."""
    results, told = folder / "results", list[dict[str, Any]]()
    deadline = time.monotonic() + timeout_s
    # Standard error: it warns that the cable leads nowhere else, which is what we want.
    with (
        (folder / "qemu.log").open("wb") as log,
        subprocess.Popen(_command(image, console, results), stdin=subprocess.DEVNULL, stderr=log) as machine,
    ):
        try:
            while True:
                is_off = machine.poll() is not None
                for document in _documents(results, len(told)):
                    told.append(document)
                    print(_line(document), flush=True)
                if is_off:
                    return told
                if time.monotonic() > deadline:
                    print(f"systemd: not finished within {timeout_s:.0f} s; powered off")
                    return told
                time.sleep(_POLL_S)
        finally:
            if machine.poll() is None:
                machine.kill()


def _line(document: dict[str, Any]) -> str:
    """A step that went well is in the table; whatever did not is worth all that is known."""
    name = document.get("step", document.get("check"))
    verdict = "ok  " if document["good"] else "FAIL"
    if document["good"] and "step" in document:
        return f"{verdict} {name}"
    figures = {key: value for key, value in document.items() if key not in ("check", "step", "good")}
    return f"{verdict} {name} {json.dumps(figures) if figures else ''}".rstrip()


def table(documents: list[dict[str, Any]]) -> str:
    """Steps as lines of text with columns."""
    rows = [["", *(title for _, title in _COLUMNS), "limit", ""]]
    for document in documents:
        if "step" in document:
            cells = ["-" if document.get(key) is None else str(document[key]) for key, _ in _COLUMNS]
            verdict = "ok" if document["good"] else "FAIL"
            rows.append([document["step"], *cells, document["limit"], verdict])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = (0, len(_COLUMNS) + 1)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.deb.vm", description=__doc__)
    cache = REPOSITORY / ".cache/deb"
    parser.add_argument("--console", type=Path, default=cache / "console.log", help="default: %(default)s")
    parser.add_argument("--json", type=Path, default=cache / "systemd.json", help="default: %(default)s")
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT_S, help="seconds for the machine; default: %(default)s"
    )
    return parser.parse_args()


def main() -> int:
    """Build, boot, print what the guest found; 1 where something is not as it must be."""
    # Ended from outside (a CI's time limit), the machine must be ended, too: raise, so that _boot cleans up.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    arguments = _arguments()
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="datapath-systemd-") as name:
        print("systemd: building the package and a Debian with it", flush=True)
        try:
            image = make_image(Path(name))
        except BuildError as error:
            print(f"systemd: {error}", file=sys.stderr)
            return 1
        except subprocess.CalledProcessError as error:
            print(f"systemd: {error}\n{error.stdout}{error.stderr}", file=sys.stderr)
            return 1
        print("systemd: booting it without KVM, three times", flush=True)
        told = _boot(image, Path(name), arguments.console, arguments.timeout)
        emulator = (Path(name) / "qemu.log").read_text(encoding="utf-8", errors="replace")
    arguments.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(told)}\n\nin {time.monotonic() - began_s:.0f} s; all figures: {arguments.json}")
    is_complete = bool(told) and told[-1].get("check") == "end"
    if not is_complete:
        print(f"systemd: not all was done; the console: {arguments.console}\n{emulator}", file=sys.stderr)
    return 0 if is_complete and all(document["good"] for document in told) else 1


if __name__ == "__main__":
    sys.exit(main())
