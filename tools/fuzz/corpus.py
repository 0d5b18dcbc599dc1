# SPDX-License-Identifier: Apache-2.0
"""Inputs in text files: one per line in hexadecimal, `#` begins a comment. A diff of them can be read."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tools.fuzz.world import CONTROL_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_DIRECTORY: Final = Path(__file__).parents[2] / "tests" / "fuzz"
#: Minimised: no two take the same way through the program.
CORPUS: Final = _DIRECTORY / "corpus.hex"
#: Each failed once.
REGRESSIONS: Final = _DIRECTORY / "regressions.hex"

#: Frames of the corpus: 8 priority tags and one more, an IPv6 header, 8 extension headers and a port pair fit in.
MAX_BYTES: Final = CONTROL_BYTES + 190


def read(path: Path) -> list[bytes]:
    """The inputs of a file.

    Raises:
        ValueError: a line is not hexadecimal, or too short to be an input.
    """
    lines = (line.partition("#")[0] for line in path.read_text(encoding="utf-8").splitlines())
    inputs = [bytes.fromhex(line) for line in lines if line.strip()]
    if any(len(data) < CONTROL_BYTES for data in inputs):
        raise ValueError(f"{path.name}: an input has at least {CONTROL_BYTES} bytes")
    return inputs


def write(path: Path, inputs: Iterable[bytes], comment: str) -> None:
    """Replace a file, sorted, so that the difference shows only what is new."""
    lines = sorted(
        {data.hex() for data in inputs if len(data) >= CONTROL_BYTES}, key=lambda line: (len(line), line)
    )
    path.write_text("".join(f"{line}\n" for line in [f"# {comment}", *lines]), encoding="utf-8")


def unpack(inputs: Iterable[bytes], directory: Path) -> None:
    """One file for each, as libFuzzer wants them."""
    directory.mkdir(parents=True, exist_ok=True)
    for data in inputs:
        (directory / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def _vary(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    varied = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 3])):
        kind = rng.randrange(5)
        place = rng.randrange(len(varied))
        if kind == 0:
            varied[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            varied[place] = (varied[place] + rng.choice([1, 255])) % 256
        elif kind == 2:
            varied[place] = rng.choice([0, 1, 4, 5, 6, 17, 44, 58, 127, 128, 255])
        elif kind == 3 and place >= CONTROL_BYTES:
            del varied[place:]
        else:
            # The circumstances of another input: the same frame on another network.
            varied[:CONTROL_BYTES] = rng.choice(others)[:CONTROL_BYTES]
    return bytes(varied)


def variations(inputs: Sequence[bytes], count: int, seed: int) -> list[bytes]:
    """`count` inputs that differ a little from the given ones; the same for the same seed."""
    rng = random.Random(seed)  # noqa: S311 - test data
    return [_vary(rng, rng.choice(inputs), inputs) for _ in range(count)]
