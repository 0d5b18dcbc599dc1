# SPDX-License-Identifier: Apache-2.0
"""What set-up installs is what the code uses: imports and external programs."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Final, NamedTuple

from tests.sources import REPOSITORY, files_with_suffix, imported_modules, python_files, syntax_tree

_OURS: Final = frozenset({"datapath", "tools", "tests"})
#: Where Debian puts programs; a name found only elsewhere is not one that set-up can install.
_SYSTEM_PATH: Final = "/usr/sbin:/usr/bin:/sbin:/bin"
_LANES: Final = ("run", "test", "vm")
#: What the project is built on. A library that is kept by others is not written out again to save its few megabytes:
#: what it does about time zones, escapes, levels and formats would have to be found out once more.
_BUILT_ON: Final = frozenset({"bcc", "nftables", "prometheus_client", "pydantic", "pyroute2", "structlog"})
#: Names of functions that start a program; their first argument, or a list in it, begins with its name.
_EXECUTES: Final = re.compile(r"run|exec|popen|output|check_call|spawn|command|cmd")


class _DebianPackage(NamedTuple):
    name: str
    lane: str
    provides: tuple[str, ...]
    reason: str


@functools.cache
def _debian_packages() -> tuple[_DebianPackage, ...]:
    text = (REPOSITORY / "tools/setup/packages.txt").read_text(encoding="utf-8")
    rows = [line.split(maxsplit=3) for line in text.splitlines() if line and not line.startswith("#")]
    return tuple(
        _DebianPackage(name, lane, () if provides == "-" else tuple(provides.split(",")), reason)
        for name, lane, provides, reason in rows
    )


def _provided(prefix: str = "", lanes: tuple[str, ...] = _LANES) -> set[str]:
    names = {name for package in _debian_packages() if package.lane in lanes for name in package.provides}
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@functools.cache
def _python_dependencies() -> tuple[frozenset[str], frozenset[str]]:
    """Distributions that the package needs, and those that only development and the benchmarks' plots need."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements: list[str]) -> frozenset[str]:
        return frozenset(_normalised(re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0]) for line in requirements)

    optional = project["optional-dependencies"]
    return names(project["dependencies"]), names(optional["dev"]) | names(optional["bench"])


def _third_party_imports(*folders: str) -> dict[str, str]:
    """Top-level module -> where it is imported first."""
    found: dict[str, str] = {}
    for path in python_files(*folders):
        for line, module in imported_modules(path):
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top not in _OURS:
                found.setdefault(top, f"{path}:{line}")
    return found


def _not_provided(imports: dict[str, str], distributions: frozenset[str], modules: set[str]) -> list[str]:
    known = metadata.packages_distributions()
    return [
        f"{where}: {module}"
        for module, where in imports.items()
        if module not in modules
        and not distributions & {_normalised(name) for name in known.get(module, (module,))}
    ]


def test_what_the_project_is_built_on_is_used() -> None:
    assert set(_third_party_imports("datapath")) >= _BUILT_ON


def test_the_package_imports_only_what_a_node_has() -> None:
    runtime, _ = _python_dependencies()
    imports = _third_party_imports("datapath")
    assert {"pyroute2", "pydantic"} <= set(imports)
    assert not _not_provided(imports, runtime, _provided("python:", ("run",)))


def test_tools_and_tests_import_only_what_set_up_installs() -> None:
    runtime, development = _python_dependencies()
    imports = _third_party_imports("tools", "tests")
    assert "pytest" in imports
    assert not _not_provided(imports, runtime | development, _provided("python:"))


def _literal_commands(path: Path) -> dict[str, int]:
    """The programs named in calls like run(["ip", ...]), execute("ip", ...) and their like, with a line."""
    commands: dict[str, int] = {}
    for node in ast.walk(syntax_tree(path)):
        if not isinstance(node, ast.Call) or not _EXECUTES.search(ast.unparse(node.func).lower()):
            continue
        lists = [item.elts[0] for item in node.args if isinstance(item, ast.List | ast.Tuple) and item.elts]
        for word in [*node.args[:1], *lists]:
            if isinstance(word, ast.Constant) and isinstance(word.value, str):
                commands.setdefault(word.value, node.lineno)
    return commands


def _owner(program: str) -> str | None:
    """The Debian package of a program on this system, or None."""
    real = Path(program).resolve()
    # Without the merged /usr in mind, packages record /sbin/x for what is /usr/sbin/x.
    for name in (str(real), str(real).removeprefix("/usr")):
        answer = subprocess.run(["dpkg-query", "-S", name], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.partition(":")[0]
    return None


def _is_essential(package: str) -> bool:
    answer = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Essential} ${Priority}\n", package],
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.split()[0] == "yes" or "required" in answer.stdout


def test_programs_belong_to_packages_that_set_up_installs() -> None:
    # apt is what set-up itself starts from.
    declared = {"apt", *(package.name for package in _debian_packages())}
    wrong = []
    seen = set()
    for path in python_files("datapath", "tools", "tests"):
        for command, line in _literal_commands(path).items():
            program = shutil.which(command, path=_SYSTEM_PATH)
            if program is None or command in seen or command in _provided():
                continue
            seen.add(command)
            owner = _owner(program)
            if owner not in declared and not (owner and _is_essential(owner)):
                wrong.append(f"{path}:{line}: {command} belongs to {owner}")
    assert not wrong, "\n".join(wrong)


def test_what_packages_promise_is_there() -> None:
    """The `provides` column is true on this machine for the lanes that `make setup` installs."""
    programs = {name for name in _provided(lanes=("run", "test")) if not name.startswith("python:")}
    missing = {name for name in programs if shutil.which(name, path=_SYSTEM_PATH) is None}
    assert not missing
    for package in _debian_packages():
        if package.lane == "vm":
            continue
        answer = subprocess.run(["dpkg-query", "-W", package.name], capture_output=True, check=False)
        assert answer.returncode == 0, package.name


def test_every_package_is_used_and_has_a_reason() -> None:
    text = "\n".join(
        (REPOSITORY / path).read_text(encoding="utf-8")
        for path in [*python_files("datapath", "tools", "tests"), *files_with_suffix(".sh")]
        if path != Path(__file__).relative_to(REPOSITORY)
    )
    for package in _debian_packages():
        assert package.lane in _LANES, package.name
        assert len(package.reason) > 20, f"{package.name}: say what needs it"
        used = [
            re.search(rf"\b{re.escape(name.removeprefix('python:'))}\b", text) for name in package.provides
        ]
        assert not package.provides or any(used), f"nothing uses {package.name} any more"
