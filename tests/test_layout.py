# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, who may touch what: the shape of the package, read from its syntax trees.

Data flows one way, `policy -> compiler -> plan -> reconcile -> kernel -> observe`. The nouns of `plan/`
are at the bottom of the imports, because every layer speaks in them.
"""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Final

from tests.sources import imported_modules, python_files, syntax_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Part of the package -> parts that it may import besides itself.
_MAY_IMPORT: Final[dict[str, frozenset[str]]] = {
    "errors": frozenset(),
    "log": frozenset({"errors"}),
    "points": frozenset(),
    "plan": frozenset({"errors"}),
    "policy": frozenset({"errors", "plan"}),
    "facts": frozenset({"errors", "plan"}),
    "compiler": frozenset({"errors", "facts", "plan", "policy"}),
    "reconcile": frozenset({"errors", "plan"}),
    "state": frozenset({"errors", "facts", "plan", "points", "reconcile", "sealed"}),
    "arguments": frozenset({"state"}),
    "in_force": frozenset({"errors", "policy", "state"}),
    "generations": frozenset({"errors", "sealed", "state"}),
    "sealed": frozenset({"errors"}),
    "kernel": frozenset({"errors", "facts", "log", "plan", "points", "reconcile", "state"}),
    "undertaking": frozenset({"errors", "kernel", "log", "plan", "reconcile", "state"}),
    "egress_sets": frozenset({"errors", "facts", "in_force", "kernel", "plan", "policy", "state"}),
    "probing": frozenset({"compiler", "errors", "facts", "kernel", "plan", "policy"}),
    "observe": frozenset(
        {"compiler", "errors", "facts", "in_force", "kernel", "log", "plan", "policy", "reconcile", "state"}
    ),
}
#: These put the parts together, so they may import all of them; nobody but the next in line imports them.
_ASSEMBLY: Final = ("controller", "confirmation", "service", "dryrun", "cli", "__main__")

_PURE: Final = ("compiler", "plan", "reconcile")
#: What a pure module has no use for: the system, files, time, chance and output.
_IMPURE_MODULES: Final = frozenset(
    {
        "asyncio",
        "bcc",
        "ctypes",
        "datetime",
        "fcntl",
        "io",
        "logging",
        "nftables",
        "os",
        "pathlib",
        "pyroute2",
        "random",
        "shutil",
        "signal",
        "socket",
        "structlog",
        "subprocess",
        "sys",
        "tempfile",
        "threading",
        "time",
    }
)
_IMPURE_CALLS: Final = frozenset({"open", "input", "exec", "eval", "__import__"})
#: Ways to the kernel, which only kernel/ takes.
_KERNEL_MODULES: Final = frozenset({"bcc", "ctypes", "nftables", "pyroute2", "socket", "subprocess"})
#: The command line, and child processes that end with their one answer: one keeps bcc's memory out of the
#: daemon, one gives nft a network namespace.
_PROGRAMS: Final = frozenset(
    {
        "datapath/cli.py",
        "datapath/__main__.py",
        "datapath/kernel/bpf/compile_child.py",
        "datapath/kernel/sandbox.py",
    }
)


def _part(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


def _called_names(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(syntax_tree(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


def _package_files(*parts: str) -> list[Path]:
    files = [path for path in python_files("datapath") if len(path.parts) > 1]
    return [path for path in files if not parts or _part(path) in parts]


def test_every_part_has_its_place() -> None:
    parts = {_part(path) for path in _package_files()} - {"__init__", *_ASSEMBLY}
    assert parts <= set(_MAY_IMPORT), "give the new part a line in _MAY_IMPORT, and a reason in its docstring"


def test_the_import_table_has_no_cycle() -> None:
    placed: set[str] = set()
    while ready := {part for part, below in _MAY_IMPORT.items() if part not in placed and below <= placed}:
        placed |= ready
    assert placed == set(_MAY_IMPORT)


def test_import_direction() -> None:
    wrong = []
    for path in _package_files():
        part = _part(path)
        if part in _MAY_IMPORT:
            allowed = {part, *_MAY_IMPORT[part]}
        elif part in _ASSEMBLY:
            allowed = {*_MAY_IMPORT, *_ASSEMBLY[: _ASSEMBLY.index(part) + 1]}
        else:
            allowed = set()
        for line, module in imported_modules(path):
            top, _, rest = module.partition(".")
            imported = rest.partition(".")[0]
            if top == "datapath" and imported not in allowed and not imported.startswith("__"):
                wrong.append(f"{path}:{line}: {part} must not import datapath.{imported}")
    assert not wrong, "\n".join(wrong)


def test_the_package_does_not_import_its_tools_or_tests() -> None:
    wrong = [
        f"{path}:{line}: {module}"
        for path in _package_files()
        for line, module in imported_modules(path)
        if module.partition(".")[0] in ("tools", "tests")
    ]
    assert not wrong, "\n".join(wrong)


def test_pure_parts_are_pure() -> None:
    files = _package_files(*_PURE)
    assert {_part(path) for path in files} == set(_PURE)
    wrong = [
        f"{path}:{line}: imports {module}"
        for path in files
        for line, module in imported_modules(path)
        if module.partition(".")[0] in _IMPURE_MODULES
    ]
    wrong += [
        f"{path}:{line}: calls {name}"
        for path in files
        for line, name in _called_names(path)
        if name in _IMPURE_CALLS
    ]
    assert not wrong, "\n".join(wrong)


def test_only_kernel_touches_the_kernel() -> None:
    wrong = [
        f"{path}:{line}: imports {module}"
        for path in _package_files()
        if _part(path) != "kernel"
        for line, module in imported_modules(path)
        if module.partition(".")[0] in _KERNEL_MODULES
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_prints_and_exits() -> None:
    wrong = []
    for path in _package_files():
        if str(path) in _PROGRAMS:
            continue
        wrong += [
            f"{path}:{line}: calls {name}"
            for line, name in _called_names(path)
            if name in ("print", "exit", "quit", "sys.exit", "os._exit", "SystemExit")
        ]
        wrong += [
            f"{path}:{node.lineno}: uses {ast.unparse(node)}"
            for node in ast.walk(syntax_tree(path))
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout", "sys.stdin")
        ]
    assert not wrong, "\n".join(wrong)
