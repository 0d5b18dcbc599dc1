# SPDX-License-Identifier: Apache-2.0
"""What could be read of a policy: all of it, or the parts of a wrong file that are right on their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datapath.policy.egress import Egress
    from datapath.policy.model import Marks, Network, Node, Policy
    from datapath.policy.probe import Probe


@dataclass(frozen=True, slots=True)
class Readable:
    """The input of the cross-checks.

    Attributes:
        networks: with their indexes in the file; those with errors of their own are missing.
        node: None where it has errors.
        marks: None where they have errors.
        egress: with their indexes in the file.
        probes: with their indexes in the file.
        complete: nothing is missing, so that "no such network" can be said.
        top: the top-level keys that are set in the file, with what they hold.
    """

    networks: tuple[tuple[int, Network], ...]
    node: Node | None
    marks: Marks | None
    egress: tuple[tuple[int, Egress], ...] = ()
    probes: tuple[tuple[int, Probe], ...] = ()
    complete: bool = False
    top: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, policy: Policy) -> Readable:
        """All of a policy."""
        return cls(
            networks=tuple(enumerate(policy.networks)),
            node=policy.node,
            marks=policy.marks,
            egress=tuple(enumerate(policy.egress)),
            probes=tuple(enumerate(policy.probes)),
            complete=True,
            top={key: getattr(policy, key) for key in policy.model_fields_set},
        )
