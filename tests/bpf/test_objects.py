# SPDX-License-Identifier: Apache-2.0
"""A kept object is the program that the compiler made, with all its maps."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from datapath.errors import KernelError
from datapath.kernel.bpf import Capacities, abi, compiler, libbpf, objects, source

pytestmark = [pytest.mark.root, pytest.mark.bpf]

TEXT = source.render(0xFF00, Capacities(16, 16))


def _load(text: source.Source = TEXT) -> tuple[str, dict[str, tuple[int, int, int, int, int]]]:
    """The kernel's digest of the instructions, and the shapes of the maps."""
    programs, fds = compiler.compile_and_load(text, functions=[abi.PROGRAM_NAME], maps=abi.MAP_NAMES)
    try:
        shapes = {
            m.name: (m.type, m.key_size, m.value_size, m.max_entries, m.flags) for m in map(libbpf.Map, fds)
        }
        info = libbpf.program_info(programs[0])
        assert info.name == abi.PROGRAM_NAME
        return info.tag, shapes
    finally:
        for fd in (*programs, *fds):
            fd.close()


def test_kept_program_is_the_compiled_one_and_needs_no_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(objects.ENVIRONMENT, raising=False)
    compiled = _load()
    monkeypatch.setenv(objects.ENVIRONMENT, str(tmp_path / "objects"))
    assert _load() == compiled
    monkeypatch.setattr(compiler, "_CHILD", tmp_path / "no-such-file")
    assert _load() == compiled
    with pytest.raises(KernelError, match="no-such-file"):
        _load(source.render(0xFF01, Capacities(16, 16)))


@pytest.mark.parametrize(
    ("opcode", "kind"), [(0x18, 1), (0x18, 2), (0x85, 1)], ids=["unknown map", "map value", "function"]
)
def test_reference_to_something_else_is_not_kept(opcode: int, kind: int) -> None:
    code = struct.pack("=BBhi", opcode, kind << 4, 0, 77).hex()
    with pytest.raises(KernelError, match="reference"):
        objects.from_compiler({"functions": {"f": code}, "maps": {}}, [], [])


def test_constant_that_looks_like_a_reference_stays() -> None:
    """The second half of a 64-bit constant is no instruction, whatever its bytes say."""
    code = struct.pack("=BBhi", 0x18, 0, 0, 7) + struct.pack("=BBhi", 0, 0, 0, 0x18)
    kept = objects.from_compiler({"functions": {"f": code.hex()}, "maps": {}}, [], [])
    assert kept.functions == {"f": code}
    assert objects.BpfObject.parse(kept.dump()) == kept
