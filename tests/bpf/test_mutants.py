# SPDX-License-Identifier: Apache-2.0
"""The mutants fit the sources of today, and the check of them can tell a killed one from a survivor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from datapath.kernel.bpf.source import bpf_directory
from tools.mutate.check import Checker, Killer
from tools.mutate.mutants import MUTANTS, Mutant

#: No conditions: layouts (compared with abi.py at every load) and map definitions.
_WITHOUT_LOGIC = {"abi.h", "maps.h", "steering_maps.h"}


@pytest.fixture
def bpf(tmp_path: Path) -> Path:
    copy = tmp_path / "bpf"
    shutil.copytree(bpf_directory(), copy)
    return copy


def test_every_mutant_fits_the_sources(bpf: Path) -> None:
    for mutant in MUTANTS:
        path = bpf / mutant.file
        text = path.read_text(encoding="utf-8")
        mutant.apply(bpf)
        assert path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")


def test_every_file_with_logic_has_mutants_and_none_is_listed_twice() -> None:
    files = {path.name for path in bpf_directory().glob("*.[ch]")} - _WITHOUT_LOGIC
    assert {mutant.file for mutant in MUTANTS} == files
    assert len(MUTANTS) >= 100
    assert len({(mutant.file, mutant.before, mutant.after) for mutant in MUTANTS}) == len(MUTANTS)


def test_mutant_of_other_sources_is_refused(bpf: Path) -> None:
    for before in ("no such text", "return"):
        with pytest.raises(ValueError, match=r"bpf/ip\.h has \d+ times"):
            Mutant("ip.h", before, "").apply(bpf)


@pytest.mark.slow
@pytest.mark.root
@pytest.mark.bpf
def test_killed_mutants_and_survivors_are_told_apart() -> None:
    checker = Checker()
    killed = checker.check(Mutant("verdict.h", "return VERDICT_MARTIAN", "return VERDICT_SPOOFED"))
    assert killed.killer is Killer.TEST
    assert killed.test.startswith("tests/bpf/")
    assert checker.check(Mutant("mark.h", "skb->mark = mark;", "skb->mark = marc;")).killer is Killer.COMPILER
    refused = Mutant("ingress.bpf.c", "\tif (!network)\n\t\treturn TC_ACT_UNSPEC;\n", "")
    assert checker.check(refused).killer is Killer.VERIFIER
    # Another comment is another text, and the same program.
    harmless = Mutant("mark.h", "The packet mark is shared with others", "The packet mark is shared")
    assert checker.check(harmless).killer is Killer.NOBODY
