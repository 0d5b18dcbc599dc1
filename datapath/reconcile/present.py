# SPDX-License-Identifier: Apache-2.0
"""What of a plan this host can carry at the moment: devices come and go, the other networks stay served.

A step that needs a device which is missing or down is not made; whoever calls decides whether to refuse
that (a person's apply) or to wait for the device (the daemon).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from datapath.plan.ingress import IngressProgram
from datapath.plan.model import Plan
from datapath.plan.steering import SteeringProgram
from datapath.reconcile.actual import ActualLink


def ready_devices(plan: Plan, links: Mapping[str, ActualLink]) -> frozenset[str]:
    """Devices that are up, or are once the plan's VLAN devices have been made and set up."""
    ready = {link.name for link in links.values() if link.up}
    for link in plan.links:  # a trunk comes before the devices on it
        if link.parent in ready:
            ready.add(link.name)
    return frozenset(ready)


def needed_devices(plan: Plan) -> frozenset[str]:
    """Every device that something of the plan hangs on."""
    networks = plan.ingress.networks
    return (
        frozenset(route.device for route in plan.routes if route.device)
        | {link.name for link in plan.links}
        | {network.device for network in networks}
        | {network.point.ifname for network in networks}
        | {network.device for network in plan.steering.networks}
    )


def waiting_devices(plan: Plan, links: Mapping[str, ActualLink]) -> frozenset[str]:
    """Needed devices that are missing or down, and that we cannot make or set up ourselves."""
    return needed_devices(plan) - ready_devices(plan, links)


def carried_program(plan: Plan, links: Mapping[str, ActualLink]) -> IngressProgram:
    """The eBPF program's input without networks whose device is not there; a device that is down may stay."""
    there = ready_devices(plan, links) | set(links)
    program = plan.attached
    kept = tuple(
        network for network in program.networks if network.device in there and network.point.ifname in there
    )
    return program if len(kept) == len(program.networks) else dataclasses.replace(program, networks=kept)


def carried_steering(plan: Plan, links: Mapping[str, ActualLink]) -> SteeringProgram:
    """The same for the egress program."""
    there = ready_devices(plan, links) | set(links)
    return _without(plan.steering, there)


def _without(program: SteeringProgram, there: frozenset[str] | set[str]) -> SteeringProgram:
    networks = tuple(network for network in program.networks if network.device in there)
    devices = tuple(name for name in program.devices if name in there)
    return dataclasses.replace(program, devices=devices, networks=networks if devices else ())


def carried_plan(plan: Plan, links: Mapping[str, ActualLink]) -> Plan:
    """The plan without what hangs on devices that are missing or down; ids, rules and table stay whole."""
    ready = ready_devices(plan, links)
    networks = tuple(
        network
        for network in plan.ingress.networks
        if network.device in ready and network.point.ifname in ready
    )
    return dataclasses.replace(
        plan,
        links=tuple(link for link in plan.links if link.name in ready),
        routes=tuple(route for route in plan.routes if not route.device or route.device in ready),
        ingress=dataclasses.replace(plan.ingress, networks=networks),
        steering=_without(plan.steering, ready),
    )
