# SPDX-License-Identifier: Apache-2.0
"""Files of ours that tell whether they are whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datapath.errors import InputError

_CHECKSUM = "sha256"


def seal(document: Mapping[str, Any]) -> str:
    """A document as the text of a file that tells whether it is whole; one line a key."""
    # Written once, for the checksum and for the file: with 4,094 networks that is a megabyte.
    lines = [f"{json.dumps(key)}: {json.dumps(document[key], sort_keys=True)}" for key in sorted(document)]
    checksum = hashlib.sha256(f"{{{', '.join(lines)}}}".encode()).hexdigest()
    lines.append(f'"{_CHECKSUM}": "{checksum}"')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def unseal(text: bytes, path: Path, *, hint: str) -> dict[str, Any]:
    """The document of such a file. One without a checksum was written by hand or by a version that had none.

    Raises:
        InputError: it is damaged; `hint` says what to do.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged: {error}", hint=hint) from error
    if not isinstance(document, dict):
        raise InputError(f"{path}: damaged: no JSON object", hint=hint)
    checksum = document.pop(_CHECKSUM, None)
    if checksum is not None and checksum != _checksum(document):
        raise InputError(f"{path}: damaged: its contents do not match its checksum", hint=hint)
    return document


def _checksum(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
