# SPDX-License-Identifier: Apache-2.0
"""Keys that are part of the format, but whose feature this version does not have.

They are refused and never ignored. When a feature arrives, its line goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from datapath.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.readable import Readable


@dataclass(frozen=True, slots=True)
class Unsupported:
    """One key that is refused.

    Attributes:
        key: the key, at the top level or in a network.
        feature: what it would do, for the message.
        instead: what to do without it.
        value: only this value is refused; None refuses any that has an effect.
        in_network: it is a key of a network.
    """

    key: str
    feature: str
    instead: str
    value: object = None
    in_network: bool = False

    def refuses(self, value: object) -> bool:
        """This value would need the feature."""
        return bool(value) if self.value is None else value == self.value


UNSUPPORTED: tuple[Unsupported, ...] = (Unsupported("egress", "egress", "remove `egress`"),)


def unsupported(readable: Readable) -> Iterator[Problem]:
    """One problem for each use of a feature that is not there."""
    for entry in UNSUPPORTED:
        # The name of a feature stands for its key, so a whole block is reported at the key.
        on_key = entry.value is None
        message = f"{entry.feature} is not supported yet"
        if not entry.in_network:
            if entry.refuses(readable.top.get(entry.key)):
                yield Problem((entry.key,), message, entry.instead, on_key)
            continue
        for index, network in readable.networks:
            if entry.refuses(getattr(network, entry.key)):
                yield Problem(("networks", index, entry.key), message, entry.instead, on_key)
