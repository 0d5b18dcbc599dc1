# SPDX-License-Identifier: Apache-2.0
"""A bounded run of the fuzzer finds nothing in our sources, and something where a check is taken out of a copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.fuzz import corpus
from tools.fuzz.build import build_target
from tools.fuzz.run import Limit, fuzz, minimise

RUNS = 150_000
SEED = 4


def _seeds() -> list[bytes]:
    return corpus.read(corpus.CORPUS) + corpus.read(corpus.REGRESSIONS)


@pytest.mark.slow
def test_bounded_run_finds_nothing(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    finding = fuzz(build_target(tmp_path), _seeds(), work, limit=Limit(runs=RUNS), seed=SEED)
    assert finding.crash is None, finding.report[-4000:]
    assert f"Done {RUNS} runs" in finding.report


@pytest.mark.parametrize(
    ("change", "found"),
    [
        pytest.param(
            (
                "ip.h",
                "cursor_read(&transport, raw, sizeof(raw))",
                "cursor_read(&transport, raw, 2 * sizeof(raw))",
            ),
            "AddressSanitizer: stack-buffer-overflow",
            id="reads-more-than-it-has-room-for",
        ),
        pytest.param(
            (
                "ip.h",
                " || total > length - start",
                "",
            ),
            "INVARIANT",
            id="believes-the-length-field",
        ),
        pytest.param(
            (
                "ip.h",
                " || transport.offset + sizeof(raw) > packet->end",
                "",
            ),
            "INVARIANT",
            id="reads-ports-behind-the-packet",
        ),
        pytest.param(
            (
                "skb.h",
                "return bpf_skb_load_bytes(skb, offset, to, size);",
                "(void)skb; __builtin_memcpy(to, shim_packet.data + offset, size); return 0;",
            ),
            "AddressSanitizer: heap-buffer-overflow",
            id="reads-without-asking-whether-it-is-there",
        ),
        pytest.param(
            (
                "mark.h",
                " & ~(__u32)FWMARK_MASK) | (fwmark & (__u32)FWMARK_MASK)",
                " & ~(__u32)FWMARK_MASK) | fwmark << 1",
            ),
            "INVARIANT",
            id="writes-outside-the-mask",
        ),
    ],
)
def test_the_fuzzer_can_fail(
    tmp_path: Path, broken_bpf: Path, change: tuple[str, str, str], found: str
) -> None:
    place, before, after = change
    path = broken_bpf / place
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1
    path.write_text(text.replace(before, after), encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    finding = fuzz(build_target(tmp_path, broken_bpf), _seeds(), work, limit=Limit(runs=RUNS), seed=SEED)
    assert finding.crash is not None, "the fuzzer found nothing in a broken program"
    assert found in finding.report


def test_minimising_keeps_what_takes_another_way(tmp_path: Path) -> None:
    target = build_target(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    inputs = _seeds()[:40]
    kept = minimise(target, [*inputs, *(data[:3] + b"\1\2\3\4" + data[7:] for data in inputs)], work)
    assert 0 < len(kept) <= 2 * len(inputs)
