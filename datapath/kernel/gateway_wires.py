# SPDX-License-Identifier: Apache-2.0
"""What gateways are asked over: one socket for all that can share it."""

from __future__ import annotations

from typing import NamedTuple

from datapath.kernel.bfd_sessions import BfdSessions
from datapath.kernel.gateway_questions import Questions, questions
from datapath.plan.gateways import CheckMethod


class Wire(NamedTuple):
    """Gateways of one family on one device, asked one way; `bfd_socket` is that of FRR's bfdd."""

    device: str
    family: int
    method: CheckMethod
    bfd_socket: str = ""

    def open(self) -> Questions:
        """Close what it returns.

        Raises:
            OSError: there is no such device, or it cannot be asked this way.
        """
        if self.method is CheckMethod.BFD:
            return BfdSessions(self.device, self.family, self.bfd_socket)
        return questions(self.device, self.family, self.method)
