# SPDX-License-Identifier: Apache-2.0
"""All rules that need more than one place of the file.

Every check is linear or sorts once: a file may have 4,095 networks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.policy import (
    check_acceleration,
    check_addresses,
    check_devices,
    check_egress,
    check_gateways,
    check_ids,
    check_isolation,
    check_references,
    check_routes,
    check_steering,
    check_vrf,
)
from datapath.policy.readable import Readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from datapath.errors import Problem
    from datapath.policy.model import Policy

CHECKS: tuple[Callable[[Readable], Iterable[Problem]], ...] = (
    check_ids.names,
    check_ids.marks,
    check_ids.tables,
    check_devices.devices,
    check_devices.parents,
    check_addresses.vips_usable,
    check_addresses.vips_apart,
    check_addresses.gateways,
    check_addresses.prefix_lists,
    check_gateways.several,
    check_gateways.questions,
    check_egress.egress,
    check_egress.egress_order,
    check_references.probes,
    check_routes.external,
    check_steering.direct,
    check_acceleration.accelerated,
    check_isolation.isolation,
    check_isolation.shared_vips,
    check_vrf.shared_tables,
)


def cross_check(readable: Readable) -> list[Problem]:
    """All problems, in no particular order."""
    return [problem for check in CHECKS for problem in check(readable)]


def check_policy(policy: Policy) -> list[Problem]:
    """The same for a policy that was not read from a file."""
    return cross_check(Readable.of(policy))
