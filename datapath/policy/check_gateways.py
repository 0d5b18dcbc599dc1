# SPDX-License-Identifier: Apache-2.0
"""Several gateways of a network fit each other, the way they are used, and what the daemon can ask in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datapath.errors import PolicyPath, Problem
from datapath.plan.gateways import CheckMethod
from datapath.policy.addresses import shown
from datapath.policy.check_addresses import gateway_problem
from datapath.policy.check_steering import is_direct
from datapath.policy.gateways import GATEWAYS_MAX, QUESTIONS_PER_SECOND_MAX, GatewayMode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.policy.model import Network
    from datapath.policy.readable import Readable


def several(readable: Readable) -> Iterator[Problem]:
    """Each is a usable neighbour and there once; what is said of them has a meaning."""
    for index, network in readable.networks:
        path: PolicyPath = ("networks", index)
        yield from _each(network, path)
        yield from _socket_for_bfd(network, path)
        if not network.gateways:
            continue
        if network.gateway_mode is GatewayMode.ACTIVE_STANDBY:
            yield from _no_weights(network, path)
        elif is_direct(readable, network):
            yield from _one_at_a_time(network, path)


def _each(network: Network, path: PolicyPath) -> Iterator[Problem]:
    seen: dict[object, int] = {}
    counts = {4: 0, 6: 0}
    for position, gateway in enumerate(network.gateways):
        where, address = (*path, "gateways", position), gateway.address
        counts[address.version] += 1
        if seen.setdefault(address, position) != position:
            yield Problem(
                where, f"{address} is listed twice", "remove one of them, or give it a larger `weight`"
            )
        elif counts[address.version] == GATEWAYS_MAX + 1:
            yield Problem(
                where,
                f"more than {GATEWAYS_MAX} IPv{address.version} gateways",
                f"use at most {GATEWAYS_MAX}",
            )
        elif problem := gateway_problem(where, network, address):
            yield problem


def _socket_for_bfd(network: Network, path: PolicyPath) -> Iterator[Problem]:
    check = network.gateway_check
    if check.method is not CheckMethod.BFD and "bfd_socket" in check.model_fields_set:
        yield Problem(
            (*path, "gateway_check", "bfd_socket"),
            f"a socket of FRR's bfdd, but gateways are asked by `method: {check.method}`",
            "remove it, or set `method: bfd`",
        )


def _no_weights(network: Network, path: PolicyPath) -> Iterator[Problem]:
    for position, gateway in enumerate(network.gateways):
        if gateway.weight != 1:
            yield Problem(
                (*path, "gateways", position, "weight"),
                "a weight, but `gateway_mode: active_standby` uses one gateway at a time",
                "remove it: the order of the list is the priority",
            )


def _one_at_a_time(network: Network, path: PolicyPath) -> Iterator[Problem]:
    if any(len(network.gateways_of(family)) > 1 for family in network.vip_families):
        key = "gateway_mode" if "gateway_mode" in network.model_fields_set else "gateways"
        yield Problem(
            (*path, key),
            "`steering: direct` knows one gateway of a network at a time, and `gateway_mode: ecmp` uses several",
            "set `gateway_mode: active_standby`, or use `steering: rules`",
        )


def questions(readable: Readable) -> Iterator[Problem]:
    """What the daemon is to ask in a second, all networks together."""
    total = 0.0
    for index, network in readable.networks:
        check = network.gateway_check
        if check.method is CheckMethod.OFF or not network.gateways:
            continue
        before = total
        total += len(network.gateways) * 1000 / check.interval_ms
        if before <= QUESTIONS_PER_SECOND_MAX < total:
            explicit = "gateway_check" in network.model_fields_set
            yield Problem(
                ("networks", index, "gateway_check" if explicit else "gateways"),
                f"up to network {shown(network.name)}, gateways are asked more than {QUESTIONS_PER_SECOND_MAX} "
                "questions a second",
                "set a larger `gateway_check.interval_ms`, here or on the networks before",
            )
