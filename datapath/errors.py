# SPDX-License-Identifier: Apache-2.0
"""Every error that a caller of this library is expected to handle.

Expected failures are `DatapathError`: the command line prints them without a stack trace and exits
with their `exit_status`. Anything else that escapes is a bug and keeps its trace.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Where in a policy something is: keys and list indexes from the root, e.g. ``("networks", 0, "vips", 1)``.
PolicyPath = tuple[str | int, ...]


class DatapathError(Exception):
    """An expected failure, with what the user can do about it.

    Attributes:
        hint: one sentence that says what to do, or an empty string.
        exit_status: what the command line exits with (design: 1 failed, 2 the input is wrong).
    """

    exit_status = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class InputError(DatapathError):
    """The user's input is wrong; nothing was changed."""

    exit_status = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a policy.

    Attributes:
        path: where it is; the loader turns this into line and column.
        message: what is wrong, without the position.
        hint: what to do, or an empty string.
        on_key: the position is that of the key (an unknown key), not of its value.
    """

    path: PolicyPath
    message: str
    hint: str = ""
    on_key: bool = False


class PolicyError(InputError):
    """A policy that cannot be used, with all its problems at once.

    Attributes:
        problems: at least one, in the order of the file.
        rendered: the text for a terminal: position, line, caret and hint of each problem.
    """

    def __init__(self, problems: tuple[Problem, ...], rendered: str) -> None:
        super().__init__(rendered)
        self.problems = problems
        self.rendered = rendered


class CompileError(InputError):
    """A policy that is right by itself but cannot be compiled for this host.

    Attributes:
        problems: at least one; the loader's source turns them into a `PolicyError` with positions.
    """

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


class KernelError(DatapathError):
    """The kernel refused an operation.

    Attributes:
        operation: what was tried, in the user's terms.
        reason: what the kernel said.
        errno: the kernel's error number, or 0 where there is none.
    """

    def __init__(self, operation: str, message: str, *, errno: int = 0, hint: str = "") -> None:
        super().__init__(f"{operation}: {message}", hint=hint)
        self.operation = operation
        self.reason = message
        self.errno = errno


class EbpfError(KernelError):
    """This host cannot load the eBPF program; the nftables backend may serve instead."""


class BusyError(DatapathError):
    """Another process of ours works on the same state directory."""


class ConflictError(DatapathError):
    """Something on this node that is not ours is in the way; nothing was changed."""


class ProbeError(DatapathError):
    """A probe of the policy fails after the change, which is undone."""
