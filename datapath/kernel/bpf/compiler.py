# SPDX-License-Identifier: Apache-2.0
"""From a program text to loaded programs and maps, through a short child process."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Final

from datapath.errors import KernelError
from datapath.kernel.bpf import objects
from datapath.kernel.bpf.compile_child import STATUS_COMPILE, STATUS_LOAD, STATUS_NO_BCC
from datapath.kernel.bpf.libbpf import OwnedFd
from datapath.kernel.bpf.source import bpf_directory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datapath.kernel.bpf.source import Source

_TIMEOUT_S: Final = 120
_CHILD: Final = Path(__file__).with_name("compile_child.py")
_OPERATION: Final = "load the eBPF program"
#: Newer kernels name the line of each verifier step: `; text @ file:line`.
_VERIFIER_LINE: Final = re.compile(r"^;.* @ ([\w.]+):(\d+)$")
_COMPILER_LINE: Final = re.compile(r"^(\S+:\d+:\d+: (?:fatal )?error: .*)$")
_SHOWN_LINES: Final = 12


def _cflags() -> list[str]:
    """System UAPI headers; on Debian asm/ is below the multiarch directory."""
    flags = ["-I/usr/include", "-Wno-unused-function"]
    multiarch = sysconfig.get_config_var("MULTIARCH")
    if multiarch:
        flags.append(f"-I/usr/include/{multiarch}")
    return flags


def _compiler_errors(messages: str) -> str:
    """The errors with the lines and carets below them; `In file included` and warnings left out."""
    lines = messages.splitlines()
    shown: list[str] = []
    for index, line in enumerate(lines):
        if _COMPILER_LINE.match(line):
            shown.append(line)
            shown.extend(text for text in lines[index + 1 : index + 3] if text.startswith(" "))
    return "\n".join(shown[:_SHOWN_LINES]) or "\n".join(lines[-_SHOWN_LINES:])


def _source_line(name: str, number: int) -> str:
    """One line of our own sources: the verifier knows only where it is."""
    for path in bpf_directory().rglob(name):
        lines = path.read_text(encoding="utf-8").splitlines()
        if 0 < number <= len(lines):
            return f"bpf/{path.relative_to(bpf_directory())}:{number}: {lines[number - 1].strip()}"
    return f"{name}:{number}"


def _verifier_refusal(messages: str) -> str:
    """Where the verifier gave up: the source line if the kernel names it, then its last words."""
    log = messages.split("\nTraceback", 1)[0].split("\nprocessed ", 1)[0].rstrip().splitlines()
    where = [match for match in map(_VERIFIER_LINE.match, log) if match is not None]
    shown = log[-_SHOWN_LINES:]
    if where:
        shown.insert(0, _source_line(where[-1].group(1), int(where[-1].group(2))))
    return "\n".join(shown)


def _failure(status: int, messages: str) -> KernelError:
    if status == STATUS_NO_BCC:
        return KernelError(_OPERATION, messages.strip(), hint="install python3-bpfcc, or choose backend: nft")
    if "Operation not permitted" in messages:
        return KernelError(
            _OPERATION,
            "the kernel does not permit it",
            errno=errno.EPERM,
            hint="bpf(2) needs root, and a kernel that is not locked down",
        )
    if status == STATUS_COMPILE:
        return KernelError(
            _OPERATION,
            f"it does not compile\n{_compiler_errors(messages)}",
            hint="the sources need the UAPI headers of linux-libc-dev",
        )
    if status == STATUS_LOAD:
        return KernelError(_OPERATION, f"the kernel refuses it\n{_verifier_refusal(messages)}")
    return KernelError(_OPERATION, f"the compiler process ended with status {status}\n{messages[-2000:]}")


def _receive(channel: socket.socket, count: int) -> list[OwnedFd]:
    _, fds, _, _ = socket.recv_fds(channel, 16, count)
    owned = [OwnedFd(fd) for fd in fds]
    if len(owned) == count:
        return owned
    for fd in owned:
        fd.close()
    raise KernelError(_OPERATION, f"got {len(owned)} of {count} file descriptors from the compiler process")


def compile_and_load(
    source: Source, *, functions: Sequence[str], maps: Sequence[str]
) -> tuple[list[OwnedFd], list[OwnedFd]]:
    """Compile a text and load some of its functions as tc programs. Nothing is attached.

    Returns:
        the programs and the maps, open, in the order asked for. The caller closes them.

    Raises:
        KernelError: bcc is missing, the text does not compile, or the verifier refuses it; the message shows
            the lines concerned.
    """
    folder = objects.directory()
    request = json.dumps(
        {
            "text": source.text,
            "cflags": _cflags(),
            "functions": list(functions),
            "maps": list(maps),
            "kernel_source": str(bpf_directory() / "stubs"),
            "export": folder is not None,
        }
    )
    if folder is None:
        programs, opened, _ = _compile(request, functions, maps)
        return programs, opened
    path = objects.entry(folder, request)
    kept = objects.read(path)
    if kept is not None:
        return kept.load(maps)
    programs, opened, exported = _compile(request, functions, maps)
    objects.keep(path, objects.from_compiler(json.loads(exported), programs, opened))
    return programs, opened


def _compile(
    request: str, functions: Sequence[str], maps: Sequence[str]
) -> tuple[list[OwnedFd], list[OwnedFd], str]:
    """Programs, maps, and what the child exported."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            try:
                child = subprocess.run(
                    [sys.executable, "-P", str(_CHILD), str(theirs.fileno())],
                    input=request,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "LC_ALL": "C"},
                    timeout=_TIMEOUT_S,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise KernelError(_OPERATION, f"compiling took more than {_TIMEOUT_S} s") from error
        if child.returncode != 0:
            raise _failure(child.returncode, child.stderr)
        received = _receive(ours, len(functions) + len(maps))
    return received[: len(functions)], received[len(functions) :], child.stdout
