# SPDX-License-Identifier: Apache-2.0
"""The text that bcc compiles: `bpf/` inlined into one file, with the constants of this node.

bcc rewrites map methods only in the main text, so headers cannot stay headers; `#line` keeps file and line of
compiler and verifier messages right.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from datapath.errors import KernelError
from datapath.kernel.bpf import abi

_LOCAL_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')


@dataclass(frozen=True, slots=True)
class Capacities:
    """How many entries the maps can hold. A program with too small maps is replaced, not grown.

    Attributes:
        networks: (device, tag) pairs.
        counters: slots, including slot 0.
    """

    networks: int
    counters: int

    @classmethod
    def for_need(cls, *, networks: int, highest_slot: int) -> Capacities:
        """The next powers of two, so that growing is rare and a one-node policy stays small."""
        return cls(
            networks=_power_of_two(max(networks, 16)), counters=_power_of_two(max(highest_slot + 1, 16))
        )

    def holds(self, need: Capacities) -> bool:
        """Whether a program with these maps has room for `need`."""
        return self.networks >= need.networks and self.counters >= need.counters


@dataclass(frozen=True, slots=True)
class Source:
    """A complete program text.

    Attributes:
        digest: SHA-256 of the text, 32 bytes: the same text is the same program.
    """

    text: str
    digest: bytes


def _power_of_two(need: int) -> int:
    return 1 << (need - 1).bit_length()


@functools.cache
def bpf_directory() -> Path:
    """Where the C sources are: beside the package in a checkout, inside it when installed.

    Raises:
        KernelError: they are in neither place.
    """
    package = Path(__file__).resolve().parents[2]
    for candidate in (package / "_bpf", package.parent / "bpf"):
        if (candidate / "ingress.bpf.c").is_file():
            return candidate
    raise KernelError(
        "find the eBPF sources", f"no bpf/ingress.bpf.c near {package}", hint="reinstall the package"
    )


def _inline(path: Path, root: Path, seen: set[Path]) -> str:
    """The file with its `#include "..."` lines replaced by those files, each once."""
    name = f"bpf/{path.relative_to(root)}" if path.is_relative_to(root) else path.name
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        match = _LOCAL_INCLUDE.match(line)
        if match is None:
            lines.append(line)
            continue
        header = root / match.group(1)
        if header not in seen:
            seen.add(header)
            lines.append(_inline(header, root, seen))
        lines.append(f'#line {number + 1} "{name}"')
    return "\n".join(lines)


def render(fwmark_mask: int, capacities: Capacities, *, entry: Path | None = None) -> Source:
    """The program for this mask and these map sizes.

    Args:
        fwmark_mask: the only bits of the mark that the program may write.
        capacities: sizes of its maps.
        entry: another main file than `ingress.bpf.c` (tests); it may include the same headers.

    Raises:
        ValueError: the mask is not a 32-bit number.
    """
    if not 0 <= fwmark_mask <= 0xFFFFFFFF:
        raise ValueError(f"fwmark mask out of range: {fwmark_mask:#x}")
    root = bpf_directory()
    prelude = (
        '#line 1 "<constants>"\n'
        f"#define FWMARK_MASK {fwmark_mask:#010x}u\n"
        f"#define NETWORKS_CAPACITY {capacities.networks}\n"
        f"#define COUNTERS_CAPACITY {capacities.counters}\n"
        f"#define DROP_BUFFER_PAGES {abi.DROP_BUFFER_PAGES}\n"
        # bcc's macro for ring buffers expects it from kernel headers; arm64 has several sizes.
        f"#define PAGE_SIZE {os.sysconf('SC_PAGE_SIZE')}\n"
    )
    main = _inline(entry or root / "ingress.bpf.c", root, set())
    text = f'{prelude}{main}\n#line 1 "<abi.py>"\n{abi.assertions()}'
    return Source(text=text, digest=hashlib.sha256(text.encode()).digest())


def steering_entry() -> Path:
    """The main file of the egress program."""
    return bpf_directory() / "steering.bpf.c"


def desired_digest(fwmark_mask: int, capacities: Capacities, *, entry: Path | None = None) -> bytes:
    """Digest of the program that would be compiled now: equal to a loaded one's if that one is current."""
    return render(fwmark_mask, capacities, entry=entry).digest
