# SPDX-License-Identifier: Apache-2.0
"""The policy in force, from its text in the state directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.policy import parse_policy

if TYPE_CHECKING:
    from datapath.policy import LoadedPolicy
    from datapath.state import State


def parse_in_force(state: State) -> LoadedPolicy:
    """Only where there is one (`state.policy`).

    Raises:
        InputError: this version does not understand it.
    """
    return parse_policy(state.policy.encode(), state.policy_name)
