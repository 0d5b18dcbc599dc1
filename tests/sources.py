# SPDX-License-Identifier: Apache-2.0
"""The files of this repository and their syntax trees, for the tests that check the code itself."""

from __future__ import annotations

import ast
import functools
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY: Final = Path(__file__).parent.parent


@functools.cache
def repository_files() -> tuple[Path, ...]:
    """Every file that is tracked, or new and not ignored, relative to the repository; sorted."""
    listing = subprocess.run(
        # CI may run as root in a clone that belongs to someone else.
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        check=True,
        text=True,
    )
    paths = {Path(name) for name in listing.stdout.split("\0") if name}
    return tuple(sorted(path for path in paths if (REPOSITORY / path).is_file()))


def files_with_suffix(*suffixes: str) -> list[Path]:
    """The repository's files with one of these suffixes."""
    return [path for path in repository_files() if path.suffix in suffixes]


def python_files(*folders: str) -> list[Path]:
    """The repository's Python files below one of these folders."""
    return [path for path in files_with_suffix(".py") if path.parts[0] in folders]


@functools.cache
def syntax_tree(path: Path) -> ast.Module:
    """The parsed file; `path` is relative to the repository."""
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"), filename=str(path))


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything a file imports, inside functions and TYPE_CHECKING blocks too."""
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (package, node.module or "") if part)
            # `from datapath import kernel` imports datapath.kernel.
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"
