# SPDX-License-Identifier: Apache-2.0
"""C and Python describe the same program, and what does not load says why."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from datapath.errors import KernelError
from datapath.kernel.bpf import Capacities, abi, compiler, objects, source
from datapath.plan.ingress import Verdict

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = Capacities(networks=16, counters=16)
needs_kernel = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of bpf/ that a test may break."""
    copy = tmp_path / "bpf"
    shutil.copytree(source.bpf_directory(), copy)

    def directory() -> Path:
        return copy

    monkeypatch.setattr(source, "bpf_directory", directory)
    monkeypatch.setattr(compiler, "bpf_directory", directory)
    return copy


def _replace(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


def _load() -> None:
    programs, maps = compiler.compile_and_load(
        source.render(0xFF00, SMALL), functions=[abi.PROGRAM_NAME], maps=abi.MAP_NAMES
    )
    for fd in (*programs, *maps):
        fd.close()


def test_text_is_one_file_with_the_places_kept() -> None:
    texts = [source.render(0xFF00, SMALL, entry=entry).text for entry in (None, source.steering_entry())]
    for text in texts:
        assert not re.search(r'^\s*#\s*include\s*"', text, re.MULTILINE)
    for header in source.bpf_directory().glob("*.h"):
        lines = header.read_text(encoding="utf-8").splitlines()
        # A few headers belong to one of the two programs only.
        counts = [text.count(f'#line 1 "bpf/{header.name}"') for text in texts]
        assert set(counts) in ({1}, {0, 1}), header
        text = texts[counts.index(1)]
        # A line of the header is where the nearest #line before it says that it is.
        number = next(n for n, line in enumerate(lines, 1) if line.startswith("#define DATAPATH_"))
        following = text.split(f'#line 1 "bpf/{header.name}"\n', 1)[1].splitlines()
        assert following[number - 1] == lines[number - 1]


def test_digest_changes_with_everything_that_is_compiled_in(sources: Path) -> None:
    def digest(mask: int = 0xFF00, capacities: Capacities = SMALL) -> bytes:
        return source.desired_digest(mask, capacities)

    first = digest()
    assert digest() == first
    others = {digest(mask=0xFF), digest(capacities=Capacities(32, 16)), digest(capacities=Capacities(16, 32))}
    assert len(others | {first}) == 4
    with (sources / "mark.h").open("a", encoding="utf-8") as file:
        file.write("/* changed */\n")
    assert digest() != first


def test_texts_do_not_depend_on_where_the_sources_are(sources: Path) -> None:
    text = source.render(0xFF00, SMALL).text
    assert str(sources) not in text


@pytest.mark.parametrize(
    ("need", "expected"),
    [((0, 0), (16, 16)), ((16, 15), (16, 16)), ((17, 16), (32, 32)), ((4000, 4000), (4096, 4096))],
)
def test_maps_are_sized_to_the_need(need: tuple[int, int], expected: tuple[int, int]) -> None:
    sized = Capacities.for_need(networks=need[0], highest_slot=need[1])
    assert (sized.networks, sized.counters) == expected


def test_stubs_are_complete_and_marked() -> None:
    stubs = source.bpf_directory() / "stubs"
    for header in stubs.rglob("*.h"):
        assert "SPDX-License-Identifier: GPL-2.0-only" in header.read_text(encoding="utf-8").splitlines()[0]
    assert (stubs / "include/linux/kconfig.h").is_file()


def test_loading_leaves_bcc_out_of_this_process() -> None:
    script = "import sys, datapath.kernel.bpf; sys.exit('bcc' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class TestMismatchCannotBeLoaded:
    """Every difference between abi.h and abi.py is a compile error that names it."""

    pytestmark = needs_kernel

    @pytest.mark.parametrize(
        ("before", "after", "named"),
        [
            (f"#define ABI_VERSION {abi.ABI_VERSION}", "#define ABI_VERSION 99", "ABI_VERSION is"),
            (
                "\tVERDICT_MARTIAN,\n\tVERDICT_SPOOFED,",
                "\tVERDICT_SPOOFED,\n\tVERDICT_MARTIAN,",
                "VERDICT_MARTIAN is",
            ),
            ("\tVERDICT_COUNT,", "\tVERDICT_EXTRA,\n\tVERDICT_COUNT,", "VERDICT_COUNT is"),
            ("\t__u16 slot;\n\t__u8 vip_check;", "\t__u8 vip_check;\n\t__u16 slot;", "network.slot"),
            ("\t__u8 digest[32];", "\t__u8 digest[31];", "program_meta.digest"),
            ("\t__u64 packets;\n\t__u64 bytes;", "\t__u64 bytes;\n\t__u64 packets;", "counter.packets"),
        ],
    )
    def test_difference_is_named(self, sources: Path, before: str, after: str, named: str) -> None:
        _replace(sources / "abi.h", before, after)
        with pytest.raises(KernelError, match=re.escape(named)):
            _load()

    def test_missing_name_is_named(self, sources: Path) -> None:
        for path in (sources / "abi.h",):
            _replace(path, "VERDICT_RPF_LOOSE", "VERDICT_RPF_LAX")
        with pytest.raises(KernelError, match="VERDICT_RPF_LOOSE"):
            _load()

    def test_unchanged_sources_load(self, sources: Path) -> None:
        assert sources.is_dir()
        _load()


class TestMessages:
    """What went wrong, where, in our own files."""

    @pytest.fixture(autouse=True)
    def compiled_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What other tests have compiled would be taken instead."""
        monkeypatch.delenv(objects.ENVIRONMENT, raising=False)

    pytestmark = needs_kernel

    def test_compile_error_shows_file_line_and_text(self, sources: Path) -> None:
        path = sources / "counters.h"
        number = next(
            n for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if "skb->len" in line
        )
        _replace(path, "skb->len", "skb->lenght")
        with pytest.raises(KernelError) as refused:
            _load()
        assert f"bpf/counters.h:{number}:" in str(refused.value)
        assert "no member named 'lenght'" in str(refused.value)

    def test_verifier_refusal_shows_its_reason(self, sources: Path) -> None:
        _replace(sources / "ingress.bpf.c", "\tif (!network)\n\t\treturn TC_ACT_UNSPEC;\n", "")
        with pytest.raises(KernelError, match="map_value_or_null") as refused:
            _load()
        assert "the kernel refuses it" in str(refused.value)
        assert "Traceback" not in str(refused.value)

    def test_missing_bcc_is_a_typed_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "bcc.py").write_text("raise ImportError('no bcc here')\n", encoding="utf-8")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(KernelError, match="no bcc here") as missing:
            _load()
        assert "python3-bpfcc" in missing.value.hint

    def test_without_privileges_the_hint_says_what_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = subprocess.run

        def unprivileged(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            as_nobody: Callable[..., subprocess.CompletedProcess[str]] = real
            drop = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
            return as_nobody([*drop, *command], **options)

        monkeypatch.setattr(subprocess, "run", unprivileged)
        with pytest.raises(KernelError) as refused:
            _load()
        assert refused.value.errno == 1
        assert "root" in refused.value.hint


def test_verdict_labels_are_the_documented_ones() -> None:
    assert [verdict.label for verdict in Verdict][:4] == ["pass", "malformed", "martian", "spoofed"]
