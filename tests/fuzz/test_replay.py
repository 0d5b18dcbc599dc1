# SPDX-License-Identifier: Apache-2.0
"""The C program, built natively with sanitizers, says of every kept input what the reference model says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from datapath.plan.ingress import Verdict
from tools.clang import BuildError
from tools.fuzz import corpus, replay, world
from tools.fuzz.build import build_replay

VARIATIONS = 30_000
SEED = 20_240_229


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_replay(tmp_path_factory.mktemp("replay"))


def _assert_agreement(program: Path, inputs: list[bytes]) -> list[str]:
    lines = replay.native(program, inputs)
    wrong = [
        f"{data.hex()}\n  program: {line}\n  model:   {replay.expected(data)}"
        for data, line in zip(inputs, lines, strict=True)
        if not replay.agrees(line, replay.expected(data))
    ]
    assert not wrong, "to be kept in regressions.hex:\n" + "\n".join(wrong[:10])
    return lines


@pytest.mark.parametrize("path", [corpus.CORPUS, corpus.REGRESSIONS], ids=lambda path: path.stem)
def test_kept_inputs_get_the_verdict_of_the_model(program: Path, path: Path) -> None:
    _assert_agreement(program, corpus.read(path))


def test_variations_of_kept_inputs_get_the_verdict_of_the_model(program: Path) -> None:
    inputs = corpus.variations(corpus.read(corpus.CORPUS), VARIATIONS, SEED)
    seen = Counter(map(replay.verdict_of, _assert_agreement(program, inputs)))
    # Inputs that never get to a verdict would compare nothing.
    assert all(seen[verdict] >= VARIATIONS // 500 for verdict in (*Verdict, None)), seen


def test_corpus_is_small_and_reaches_every_verdict_and_network(program: Path) -> None:
    inputs = corpus.read(corpus.CORPUS)
    assert 100 <= len(inputs) <= 400
    assert max(map(len, inputs)) <= corpus.MAX_BYTES
    lines = replay.native(program, inputs)
    assert set(map(replay.verdict_of, lines)) == {*Verdict, None}
    slots = {network.slot for network in world.PROGRAM.networks}
    assert {line.split()[2] for line in lines} == {*map(str, slots), "0", "-"}


def test_another_verdict_is_noticed(tmp_path: Path, broken_bpf: Path) -> None:
    verdict = broken_bpf / "verdict.h"
    text = verdict.read_text(encoding="utf-8")
    swapped = text.replace("return VERDICT_MARTIAN;", "return VERDICT_SPOOFED;")
    assert swapped != text
    verdict.write_text(swapped, encoding="utf-8")
    with pytest.raises(AssertionError, match="model"):
        _assert_agreement(build_replay(tmp_path, broken_bpf), corpus.read(corpus.CORPUS))


def test_sources_that_do_not_compile_are_an_error(tmp_path: Path, broken_bpf: Path) -> None:
    (broken_bpf / "ip.h").write_text("no C\n", encoding="utf-8")
    with pytest.raises(BuildError, match=r"ip\.h"):
        build_replay(tmp_path, broken_bpf)


def test_input_files_refuse_what_is_no_input(tmp_path: Path) -> None:
    path = tmp_path / "inputs.hex"
    corpus.write(path, [bytes(range(8)), bytes(3), bytes(range(8))], "why")
    assert path.read_text(encoding="utf-8") == "# why\n0001020304050607\n"
    assert corpus.read(path) == [bytes(range(8))]
    for wrong in ("00", "zz" * 8):
        path.write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=r"inputs\.hex|hexadecimal"):
            corpus.read(path)
