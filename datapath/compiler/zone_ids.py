# SPDX-License-Identifier: Apache-2.0
"""Connection-tracking zones of isolated networks: allocated once, read back from the kernel, never moved.

Zones are shared by everybody on the node. Ours come from a range that none of the agents we know of uses: OVN
counts up from 1 and Neutron from 4097, VyOS takes the numbers of its VRF tables, OVN-Kubernetes 64000 and up, Antrea
65510 and up.
"""

from __future__ import annotations

from collections.abc import Iterator

from datapath.compiler.pool import Pool
from datapath.errors import CompileError, Problem
from datapath.facts import Facts, IdFacts
from datapath.policy import Network, Policy

ZONE_BASE = 40_000
ZONE_LAST = 63_999
_ROOM = ZONE_LAST - ZONE_BASE


def allocate_zones(policy: Policy, facts: Facts) -> dict[str, int]:
    """The zone of each isolated network, by name: pins first, then what the kernel has, then new ones by name.

    Raises:
        CompileError: a pinned zone is somebody else's, or none is left.
    """
    positions = {network.name: number for number, network in enumerate(policy.networks)}
    wanting = sorted((n for n in policy.networks if n.isolate_clients), key=lambda network: network.name)
    if not wanting:
        return {}
    known = {ids.name: ids for ids in facts.ids}
    zones = {network.name: network.zone for network in wanting if network.zone is not None}
    problems = list(_pins_of_others(zones, positions, known, facts))
    pool = Pool({zone - ZONE_BASE for zone in zones.values()})
    rest: list[Network] = []
    for network in wanting:
        zone = known.get(network.name, IdFacts(name=network.name)).zone
        if network.name in zones:
            continue
        if zone and pool.claim(zone - ZONE_BASE):
            zones[network.name] = zone
        else:
            rest.append(network)
    pool.taken |= {zone - ZONE_BASE for zone in facts.taken_zones}
    freed = frozenset(ids.zone - ZONE_BASE for ids in facts.ids if ids.zone and ids.name not in zones)
    for network in rest:
        zones[network.name] = ZONE_BASE + pool.take(0, freed, _ROOM)
        if zones[network.name] > ZONE_LAST:
            problems.append(_exhausted(network, positions[network.name], facts))
    if problems:
        raise CompileError(tuple(problems))
    return zones


def _pins_of_others(
    pins: dict[str, int], positions: dict[str, int], known: dict[str, IdFacts], facts: Facts
) -> Iterator[Problem]:
    for name, zone in pins.items():
        owner = facts.taken_zones.get(zone)
        if owner and (name not in known or known[name].zone != zone):
            yield Problem(
                ("networks", positions[name], "zone"),
                f"connection-tracking zone {zone} is used by {owner}",
                "leave `zone` out: a free one is chosen",
            )


def _exhausted(network: Network, position: int, facts: Facts) -> Problem:
    owners = sorted({owner for zone, owner in facts.taken_zones.items() if ZONE_BASE < zone <= ZONE_LAST})
    return Problem(
        ("networks", position, "isolate_clients"),
        f"no connection-tracking zone is left for network {network.name}: of {ZONE_BASE + 1}..{ZONE_LAST}, all are used"
        f" by {', '.join(owners[:3]) or 'the other networks'}",
        "pin `zone` to a free one outside that range",
    )
