# SPDX-License-Identifier: Apache-2.0
"""The linters are tests: what they refuse fails like any other fault, here and in CI."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Final

from tests.sources import REPOSITORY, files_with_suffix, python_files, repository_files, syntax_tree

if TYPE_CHECKING:
    from pathlib import Path

#: A file that does more than one thing is usually longer than this.
_MAX_LINES: Final = 450
#: Path -> why it may be longer.
_LONG_FILES: Final[dict[str, str]] = {}

_CODE_SUFFIXES: Final = (".py", ".c", ".h", ".sh")
_CODE_NAMES: Final = ("Makefile", "run", "packages.txt", "pyproject.toml")

# Written so that this file does not match itself.
_FORBIDDEN: Final = {
    "a path of one machine": re.compile(
        r"(?<![\w.$}])/(?:wor[k]|roo[t]|home/\w+|opt/pyp[i][\w-]*)/|" + re.escape(f"{REPOSITORY}/")
    ),
    "a file outside the repository": re.compile(r"\.\./share[d]"),
    "the host of a package registry": re.compile(
        r"(?:deb|security|snapshot)\.debian\.or[g]|pypi\.or[g]|pythonhosted\.or[g]|docker\.i[o]\b|proxy\.golang\.or[g]"
    ),
    "unfinished work": re.compile(r"\b(?:TOD[O]|FIXM[E]|XX[X])\b"),
}


def _assert_quiet(*command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _code_files() -> list[Path]:
    return [path for path in repository_files() if path.suffix in _CODE_SUFFIXES or path.name in _CODE_NAMES]


def test_ruff_check() -> None:
    _assert_quiet("ruff", "check", "--quiet", "--output-format=concise", ".")


def test_ruff_format() -> None:
    _assert_quiet("ruff", "format", "--check", "--quiet", ".")


def test_mypy_strict() -> None:
    _assert_quiet("mypy")


def test_shell_scripts_parse() -> None:
    scripts = [".ci/run", *map(str, files_with_suffix(".sh"))]
    assert len(scripts) > 1
    for script in scripts:
        result = subprocess.run(
            ["bash", "-n", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr


def test_every_source_file_names_its_licence() -> None:
    wrong = []
    for path in _code_files():
        # What is loaded into the kernel, also by a test that includes our program.
        in_kernel = path.parts[0] == "bpf" or path.name.endswith(".bpf.c")
        in_kernel |= path.parts[:2] == ("tests", "bpf") and path.suffix == ".c"
        licence = "GPL-2.0-only" if in_kernel else "Apache-2.0"
        head = (REPOSITORY / path).read_text(encoding="utf-8").splitlines()[:2]
        lines = [line for line in head if not line.startswith("#!")]
        if not lines or f"SPDX-License-Identifier: {licence}" not in lines[0]:
            wrong.append(f"{path}: no 'SPDX-License-Identifier: {licence}' in its first line")
    assert not wrong, "\n".join(wrong)


def test_no_text_that_is_true_only_here_or_only_today() -> None:
    found = []
    for path in repository_files():
        try:
            text = (REPOSITORY / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # inputs of tests are broken on purpose
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found += [
                f"{path}:{number}: {what}: {line.strip()[:100]}"
                for what, pattern in _FORBIDDEN.items()
                if pattern.search(line)
            ]
    assert not found, "\n".join(found)


def test_no_file_is_too_long() -> None:
    lengths = {
        str(path): len((REPOSITORY / path).read_text(encoding="utf-8").splitlines()) for path in _code_files()
    }
    long = {path: lines for path, lines in lengths.items() if lines > _MAX_LINES}
    assert sorted(long) == sorted(_LONG_FILES), f"over {_MAX_LINES} lines: {long}, expected: {_LONG_FILES}"


def test_skips_go_through_a_probe() -> None:
    """A skip anywhere else could hide a failure: mark the test with kernel_feature or root instead."""
    found = [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path in python_files("tests")
        if str(path) != "tests/conftest.py"
        for node in ast.walk(syntax_tree(path))
        if isinstance(node, ast.Attribute)
        and node.attr in ("skip", "skipif", "importorskip", "xfail")
        and ast.unparse(node.value) in ("pytest", "pytest.mark", "mark")
    ]
    assert not found, "\n".join(found)
