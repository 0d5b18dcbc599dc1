# SPDX-License-Identifier: Apache-2.0
"""`probes` of a policy -> what is to be tried, and which of it says something about the time before a change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from datapath.plan.probe import ProbeKind, ProbeTask
from datapath.policy import Network, Policy, Probe


def compile_probes(policy: Policy, fwmarks: Mapping[str, int]) -> tuple[ProbeTask, ...]:
    """Everything to try, in the order of the file.

    Args:
        policy: whose probes.
        fwmarks: by network, as they are in force when it is tried.
    """
    networks = {network.name: network for network in policy.networks}
    return tuple(
        task
        for position, probe in enumerate(policy.probes)
        for task in _tasks(probe, position, networks.get(probe.network_name or ""), fwmarks)
    )


def _tasks(
    probe: Probe, position: int, network: Network | None, fwmarks: Mapping[str, int]
) -> Iterator[ProbeTask]:
    name = network.name if network else ""
    device = network.device if network else ""
    mark = fwmarks.get(name, 0)
    if probe.gateway is not None and network is not None:
        for address in network.gateway_addresses:
            title = f"gateway {address} of {name}"
            yield ProbeTask(
                title,
                position,
                ProbeKind.GATEWAY,
                address,
                network=name,
                device=device,
                timeout_s=probe.timeout,
                attempts=probe.attempts,
            )
    endpoint = probe.endpoint
    if endpoint is not None:
        kind = ProbeKind.HTTP if probe.http is not None else ProbeKind.TCP
        by = f" by {name}" if name else ""
        yield ProbeTask(
            f"{kind} {probe.http or endpoint}{by}",
            position,
            kind,
            endpoint.address,
            port=endpoint.port,
            host=probe.http.host if probe.http else "",
            path=probe.http.path if probe.http else "",
            network=name,
            device=device,
            fwmark=mark,
            timeout_s=probe.timeout,
            attempts=probe.attempts,
        )


def with_before(tasks: Iterable[ProbeTask], previous: Policy | None) -> tuple[ProbeTask, ...]:
    """Those that could have worked before: their network, device and gateway were there.

    Args:
        tasks: of the new policy.
        previous: the policy in force, None where there is none.
    """
    networks = {network.name: network for network in previous.networks} if previous else {}
    return tuple(task for task in tasks if not task.network or _was_there(task, networks.get(task.network)))


def _was_there(task: ProbeTask, network: Network | None) -> bool:
    if network is None or network.device != task.device:
        return False
    return task.kind is not ProbeKind.GATEWAY or task.address in network.gateway_addresses
