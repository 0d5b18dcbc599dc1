# SPDX-License-Identifier: Apache-2.0
"""nft transactions, checked and applied from memory: what is reviewed, tried and applied is one text.

A file in memory, because libnftables gives the position of an error only for files, and because a disk that
is full must not keep anybody from being healed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import nftables

from datapath.errors import KernelError

_HINT = (
    "this is a bug in datapath, or the kernel lacks a part of nf_tables: please report it with this message and"
    " the policy"
)
#: How messages call the file.
_NAME = "nft transaction"


def check(text: str) -> None:
    """Let nft and the kernel look at a transaction without applying it.

    Raises:
        KernelError: with nft's own message: line, column and caret.
    """
    _run(text, dry_run=True, operation="check the nft rules")


def apply(text: str) -> None:
    """Apply a transaction: all of it, or nothing.

    Raises:
        KernelError: with nft's own message.
    """
    _run(text, dry_run=False, operation="apply the nft rules")


def _run(text: str, *, dry_run: bool, operation: str) -> None:
    nft = nftables.Nftables()
    nft.set_dry_run(dry_run)
    try:
        with _in_memory(text) as path:
            status, _, errors = nft.cmd_from_file(path)
    except OSError as error:
        raise KernelError(operation, error.strerror or str(error), errno=error.errno or 0) from error
    if status != 0:
        message = str(errors).replace(path, _NAME).strip()
        raise KernelError(operation, message or "refused without a message", hint=_HINT)


@contextmanager
def _in_memory(text: str) -> Iterator[str]:
    """A path that opens the text."""
    with os.fdopen(os.memfd_create("datapath-nft", os.MFD_CLOEXEC), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"
