# SPDX-License-Identifier: Apache-2.0
"""What all parts of a policy have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class PolicyModel(BaseModel):
    """Immutable, and no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")
