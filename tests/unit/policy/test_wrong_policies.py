# SPDX-License-Identifier: Apache-2.0
"""Every wrong policy gets its documented text: position, line, caret and hint."""

from __future__ import annotations

from pathlib import Path

import pytest

from datapath.errors import PolicyError
from datapath.policy import parse_policy

CORPUS = Path(__file__).parents[2] / "golden" / "wrong_policies"
CASES = sorted(p for p in CORPUS.iterdir() if p.suffix in {".yaml", ".bin"})


def test_corpus_is_complete() -> None:
    assert len(CASES) >= 45
    assert {p.stem for p in CORPUS.glob("*.expected")} == {p.stem for p in CASES}


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_rendered_text(case: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(case.read_bytes(), case.name)
    assert caught.value.exit_status == 2
    assert caught.value.problems
    assert caught.value.rendered + "\n" == case.with_suffix(".expected").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_nothing_for_a_terminal_to_act_upon(case: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_policy(case.read_bytes(), case.name)
    assert all(c.isprintable() or c in "\n\t" for c in caught.value.rendered)
