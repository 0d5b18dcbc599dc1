# SPDX-License-Identifier: Apache-2.0
"""What `datapath doctor` says about gateways. Pure: from what was heard to findings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address

from datapath.facts import LinkFacts
from datapath.kernel.host import HostView
from datapath.kernel.who_answers import Answer, Question
from datapath.observe.findings import Finding, fail, ok, warn
from datapath.observe.policy_view import PolicyView
from datapath.plan.gateways import CheckMethod, GatewayCheck
from datapath.plan.model import Plan
from datapath.policy import Network, Policy

_NAMED = 8


def gateway_questions(plan: Plan) -> tuple[Question, ...]:
    """What is to be asked for `check_gateways`: those that the daemon watches, the way it does."""
    return tuple(
        Question(check.device, check.address, check.method, check.bfd_socket) for check in plan.checks
    )


def check_gateways(host: HostView, view: PolicyView) -> Iterator[Finding]:
    """Findings about gateways; of those that are watched, only where a network has several or says how."""
    yield from _subnets(view.policy, {link.name: link for link in view.links})
    asked = dict(zip(view.plan.checks, gateway_questions(view.plan), strict=True))
    answers = {check: view.heard.get(question, Answer()) for check, question in asked.items()}
    by_network: dict[tuple[str, int], list[GatewayCheck]] = {}
    for check in view.plan.checks:
        by_network.setdefault((check.network, check.address.version), []).append(check)
    for (network, family), checks in by_network.items():
        yield from _unasked(checks, answers)
        gone = [check for check in checks if not answers[check].is_there and not answers[check].problem]
        if gone and len(gone) == len(checks):
            yield _all_gone(network, family, gone)
        elif gone:
            yield _some_gone(network, gone, is_moved=host.daemon is not None or not view.is_in_force)
    yield from _daemon(host, view)
    if answers and all(answer.is_there for answer in answers.values()):
        yield ok("gateways", f"all {len(answers)} that are watched answer")


def _subnets(policy: Policy, links: Mapping[str, LinkFacts]) -> Iterator[Finding]:
    for network in policy.networks:
        link = links.get(network.device)
        outside = [] if link is None else list(_outside(network, link))
        if link is not None and outside:
            addresses = ", ".join(str(address) for address in link.addresses if not address.ip.is_link_local)
            yield warn(
                "gateways",
                f"{_few(map(str, outside))} of network {network.name} in no subnet of {network.device} ({addresses})",
                "a router answers for addresses of its own subnet to senders of that subnet, usually: it may never"
                " answer this node",
                "correct the gateway, the device's address or its prefix length; nothing is wrong if the router is set"
                " up that way",
            )


def _outside(network: Network, link: LinkFacts) -> Iterator[IPv4Address | IPv6Address]:
    """Gateways that none of the device's subnets holds; those of a device without addresses are not."""
    for gateway in network.gateway_addresses:
        subnets = [
            address.network
            for address in link.addresses
            if address.version == gateway.version
            and not address.ip.is_link_local
            and address.network.prefixlen < address.max_prefixlen
        ]
        if subnets and not gateway.is_link_local and not any(gateway in subnet for subnet in subnets):
            yield gateway


def _unasked(checks: list[GatewayCheck], answers: Mapping[GatewayCheck, Answer]) -> Iterator[Finding]:
    for problem in sorted({answers[check].problem for check in checks} - {""}):
        same = [check for check in checks if answers[check].problem == problem]
        yield warn(
            "gateways",
            f"{_names(same)} of network {same[0].network} cannot be asked on {same[0].device}: {problem}",
            "nobody notices if one of them fails, and it stays in use",
            "do what that says: `show bfd peers` in vtysh tells what FRR knows"
            if same[0].method is CheckMethod.BFD
            else "look at the device: is it up, has it a carrier, and for `method: icmp` an address on the gateway's"
            " subnet?",
        )


def _all_gone(network: str, family: int, gone: list[GatewayCheck]) -> Finding:
    return fail(
        "gateways",
        f"none of the IPv{family} gateways of network {network} answers on {gone[0].device}: {_names(gone)}",
        "answers to clients behind them are lost; all are used as if they were up, because the check is never what"
        " cuts a node off",
        f"look at the link and its VLAN (`ip -s link show {gone[0].device}`), and at the routers"
        + (": do they limit echo replies? `method: neighbour` asks otherwise" if _by_icmp(gone) else ""),
    )


def _by_icmp(gone: list[GatewayCheck]) -> bool:
    return gone[0].method.value == "icmp"


def _some_gone(network: str, gone: list[GatewayCheck], *, is_moved: bool) -> Finding:
    seen = f"of network {network} does not answer on {gone[0].device}: {_names(gone)}"
    if not is_moved:
        return fail(
            "gateways",
            seen,
            "no daemon runs that would move its flows to the others: they are lost",
            "systemctl start datapath, or `datapath run POLICY`; and look at that router",
        )
    return warn(
        "gateways",
        seen,
        "its flows go by the others, and there is one less to fail",
        "look at that router; the daemon takes it back by itself when it answers",
    )


def _daemon(host: HostView, view: PolicyView) -> Iterator[Finding]:
    """The packaged unit allows packet sockets to nobody."""
    up = {link.name for link in view.links if link.up}
    by_packet = [check for check in view.plan.checks if check.method is not CheckMethod.BFD]
    can_be_asked = any(check.device in up for check in by_packet)
    if view.is_in_force and can_be_asked and host.daemon is not None and host.packet_sockets == 0:
        yield fail(
            "gateways",
            f"the daemon (pid {host.daemon}) asks none of {len(by_packet)}: it has no packet socket open",
            "all gateways are used as they are written, also those that fail",
            "`systemctl edit datapath`: [Service] RestrictAddressFamilies=AF_PACKET, and restart it; outside of the"
            " unit, give it CAP_NET_RAW. Its log says `gateway_cannot_be_asked` with the reason",
        )


def _names(checks: Iterable[GatewayCheck]) -> str:
    return _few(str(check.address) for check in checks)


def _few(words: Iterable[str]) -> str:
    listed = list(words)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return ", ".join(listed[:_NAMED]) + more
