# SPDX-License-Identifier: Apache-2.0
"""Past policies: what was in force, when, and how one differs from the other."""

from __future__ import annotations

import base64
import binascii
import contextlib
import difflib
import re
import zlib
from dataclasses import dataclass
from typing import Any

import pydantic

from datapath.errors import InputError
from datapath.sealed import seal, unseal
from datapath.state import StateDirectory

#: Generations that are kept; the oldest go first.
KEPT = 20
_FOLDER = "history"
#: In a file, instead of `plan`, which earlier versions wrote. The state directory is memory (/run), and the plan of
#: 4,094 networks is 7 MB of text, of which a few hundred kB are left.
_DEFLATED = "plan_zlib"
_FASTEST = 1
_NAME = re.compile(r"(?P<number>\d{6})\.json\Z")
_REMEDY = "remove it: the policy in force and the other generations do not need it"


@dataclass(frozen=True, slots=True)
class Generation:
    """One policy that was put in force.

    Attributes:
        number: counts up with every change.
        applied_at: UTC, ISO 8601.
        plan: the compiled plan as text.
    """

    number: int
    applied_at: str
    policy_name: str
    policy: str
    plan: str

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "applied_at": self.applied_at,
            "policy_name": self.policy_name,
            "policy": self.policy,
            "plan": self.plan,
        }


_GENERATION = pydantic.TypeAdapter(Generation)


class History:
    """The generations of one state directory."""

    def __init__(self, directory: StateDirectory) -> None:
        self._directory = directory
        self._folder = directory.path / _FOLDER

    def add(self, generation: Generation) -> None:
        """Keep one more, and drop the oldest.

        Raises:
            DatapathError: it cannot be written.
        """
        document = generation.as_json()
        deflated = zlib.compress(document.pop("plan").encode(), _FASTEST)
        document[_DEFLATED] = base64.b64encode(deflated).decode()
        self._directory.write(f"{_FOLDER}/{generation.number:06}.json", seal(document))
        for number in self.numbers()[:-KEPT]:
            self.discard(number)

    def discard(self, number: int) -> None:
        """Forget one; one too many does no harm, so it is no error if that cannot be done."""
        with contextlib.suppress(OSError):
            (self._folder / f"{number:06}.json").unlink(missing_ok=True)

    def numbers(self) -> list[int]:
        """Numbers of all kept generations, oldest first.

        Raises:
            InputError: the folder cannot be read.
        """
        try:
            names = [path.name for path in self._folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(
                f"{self._folder}: cannot be read: {error.strerror}",
                hint="run it as root; if it is no directory, remove it",
            ) from error
        matches = (_NAME.match(name) for name in names)
        return sorted(int(match["number"]) for match in matches if match)

    def get(self, number: int) -> Generation:
        """One generation.

        Raises:
            InputError: it is not kept, or its file is damaged.
        """
        path = self._folder / f"{number:06}.json"
        try:
            document = unseal(path.read_bytes(), path, hint=_REMEDY)
            if _DEFLATED in document:
                document["plan"] = zlib.decompress(base64.b64decode(document.pop(_DEFLATED))).decode()
            return _GENERATION.validate_python(document)
        except FileNotFoundError as error:
            kept = ", ".join(map(str, self.numbers())) or "none"
            raise InputError(f"there is no generation {number}", hint=f"kept: {kept}") from error
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}", hint=_REMEDY) from error
        except (zlib.error, binascii.Error, TypeError, UnicodeError) as error:
            raise InputError(f"{path}: damaged: {_DEFLATED}: {error}", hint=_REMEDY) from error
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise InputError(f"{path}: damaged: {where}: {first['msg']}", hint=_REMEDY) from error

    def diff(self, number: int) -> str:
        """What the policy of a generation changed against the one kept before it, as a unified diff."""
        earlier = [kept for kept in self.numbers() if kept < number]
        new = self.get(number)
        old = self.get(earlier[-1]) if earlier else Generation(0, "", "", "", "")
        return "".join(
            difflib.unified_diff(
                old.policy.splitlines(keepends=True),
                new.policy.splitlines(keepends=True),
                f"generation {old.number}",
                f"generation {new.number}",
            )
        )
