# SPDX-License-Identifier: Apache-2.0
"""What of a plan this host can carry at the moment: devices come and go, the other networks stay served.

A step that needs a device which is missing or down is not made; whoever calls decides whether to refuse
that (a person's apply) or to wait for the device (the daemon).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from datapath.plan.ingress import IngressProgram
from datapath.plan.model import Plan
from datapath.plan.nft import NftFlowtable, NftTable
from datapath.plan.rtnl import Slave, VrfLink
from datapath.plan.steering import SteeringProgram
from datapath.reconcile.actual import ActualLink


def ready_devices(
    plan: Plan, links: Mapping[str, ActualLink], slaves: frozenset[Slave] = frozenset()
) -> frozenset[str]:
    """Devices that are up where the plan wants them, or are once we have made, set up and moved what we may.

    Args:
        plan: what is desired.
        links: as they are.
        slaves: devices that we put into a VRF, and may move.
    """
    ready = {link.name for link in links.values() if link.up}
    for link in plan.links:  # a trunk comes before the devices on it
        if link.parent in ready:
            ready.add(link.name)
    for vrf in plan.vrfs:
        (ready.add if is_ready_vrf(vrf, links.get(vrf.name)) else ready.discard)(vrf.name)
    ready -= {slave.device for slave in plan.slaves if slave.vrf not in ready}
    ready -= {slave.device for slave in plan.slaves if not is_free_for(slave, links, slaves)}
    return frozenset(ready)


def is_in(slave: Slave, links: Mapping[str, ActualLink]) -> bool:
    """The device is there, in that VRF."""
    present = links.get(slave.device)
    return present is not None and present.vrf == slave.vrf


def is_free_for(slave: Slave, links: Mapping[str, ActualLink], slaves: frozenset[Slave]) -> bool:
    """The device is in its VRF, in none, or in one that we put it into."""
    present = links.get(slave.device)
    if present is None or present.vrf in ("", slave.vrf):
        return True
    return Slave(slave.device, present.vrf) in slaves


def is_ready_vrf(vrf: VrfLink, present: ActualLink | None) -> bool:
    """It is there with its table, or is once we have made it."""
    if present is None:
        return vrf.is_made
    return present.kind == "vrf" and present.vrf_table == vrf.table and (present.up or vrf.is_made)


def needed_devices(plan: Plan) -> frozenset[str]:
    """Every device that something of the plan hangs on."""
    networks = plan.ingress.networks
    return (
        frozenset(route.device for route in plan.routes if route.device)
        | {link.name for link in plan.links}
        | {slave.device for slave in plan.slaves}
        | {vrf.name for vrf in plan.vrfs}
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


def carried_table(table: NftTable | None, devices: Collection[str]) -> NftTable | None:
    """The table, its flowtables with those devices only that are there; the very same one where nothing is missing."""
    if table is None or all(name in devices for item in table.flowtables for name in item.devices):
        return table
    flowtables = tuple(
        NftFlowtable(item.name, tuple(name for name in item.devices if name in devices))
        for item in table.flowtables
    )
    return dataclasses.replace(table, flowtables=flowtables)


def without_flowtables(table: NftTable) -> NftTable:
    """What a kernel without flowtables takes of it."""
    chains = tuple(
        dataclasses.replace(
            chain, rules=tuple(rule for rule in chain.rules if not rule.text.startswith("flow add "))
        )
        for chain in table.chains
    )
    return dataclasses.replace(table, chains=chains, flowtables=())


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
        vrfs=tuple(vrf for vrf in plan.vrfs if vrf.is_made or vrf.name in links),
        slaves=tuple(slave for slave in plan.slaves if slave.device in ready or slave.device in links),
        routes=tuple(route for route in plan.routes if not route.device or route.device in ready),
        ingress=dataclasses.replace(plan.ingress, networks=networks),
        steering=_without(plan.steering, ready),
    )
