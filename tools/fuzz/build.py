# SPDX-License-Identifier: Apache-2.0
"""Builds the natively compiled program: the fuzz target, and the one that replays inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from datapath.kernel.bpf.source import bpf_directory
from tools import clang
from tools.fuzz import world

_SOURCES: Final = Path(__file__).parent
_SANITIZERS: Final = "address,undefined"
_FLAGS: Final = ("-std=gnu11", "-g", "-fno-strict-aliasing")
#: Only for this tree: a broken copy may leave something unused.
_WARNINGS: Final = ("-Wall", "-Wextra", "-Werror")


def _compile(name: str, directory: Path, bpf: Path | None, *options: str) -> Path:
    (directory / "world.h").write_text(world.header(), encoding="utf-8")
    paths = [str(_SOURCES / f"{name}.c"), f"-I{directory}", f"-I{bpf or bpf_directory()}"]
    warnings = ["-w"] if bpf else _WARNINGS
    return clang.build([*_FLAGS, *warnings, *options, *paths], directory / name)


def build_target(directory: Path, bpf: Path | None = None) -> Path:
    """The libFuzzer program.

    Args:
        directory: gets the binary.
        bpf: other sources than those of this tree.

    Raises:
        BuildError: they do not compile.
    """
    return _compile(
        "target", directory, bpf, "-O1", f"-fsanitize=fuzzer,{_SANITIZERS}", "-fno-sanitize-recover=all"
    )


def build_replay(directory: Path, bpf: Path | None = None, *, sanitize: bool = True) -> Path:
    """The program that prints what becomes of inputs; see `build_target`.

    Args:
        directory: gets the binary.
        bpf: other sources than those of this tree.
        sanitize: without, it compiles and runs several times faster.
    """
    options = ["-O1", f"-fsanitize={_SANITIZERS}", "-fno-sanitize-recover=all"] if sanitize else ["-O0"]
    return _compile("replay", directory, bpf, *options)
