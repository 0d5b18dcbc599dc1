# SPDX-License-Identifier: Apache-2.0
"""Checks of a policy against the node. Pure: from what was seen to findings."""

from __future__ import annotations

import re
from collections.abc import Iterator

from datapath.kernel.host import HostView
from datapath.observe.doctor_egress import check_egress
from datapath.observe.doctor_gateways import check_gateways
from datapath.observe.doctor_host import bits_used, free_profiles
from datapath.observe.doctor_vrf import check_vrfs
from datapath.observe.doctor_zones import check_zones
from datapath.observe.findings import Finding, fail, ok, warn
from datapath.observe.policy_view import PolicyView
from datapath.observe.status import filtered_note
from datapath.policy.marks import capacity
from datapath.reconcile.actual import Actual
from datapath.reconcile.conflicts import find_conflicts, users_of_our_tables
from datapath.state import State

_CONF = re.compile(r"net/ipv4/conf/(?P<device>[^/]+)/(?P<name>[^/]+)\Z")
_ARP = frozenset({"arp_ignore", "arp_announce"})
#: Agents by a device that only they make, with what a policy must know of them.
_CILIUM, _OVN = "cilium_host", "ovn-k8s-mp0"
#: OVN-Kubernetes deletes rules of others at these priorities.
_OVN_PRIORITIES = frozenset({2000, 6000})
_NAMED = 8


def check_policy(host: HostView, view: PolicyView, now_s: float) -> Iterator[Finding]:
    """Findings about a policy. `now_s` is the boot clock."""
    yield from _conflicts(view)
    yield from _marks(host, view)
    yield from check_zones(view.plan, view.zones)
    yield from _others(view)
    yield from _forwarding(host, view)
    yield from _external_tables(view)
    if view.is_in_force:
        yield from _rp_filter(host, view)
        yield from _arp(host, view)
    yield from _src_valid_mark(host, view)
    yield from check_vrfs(view.plan, view.actual)
    yield from check_gateways(host, view)
    yield from check_egress(view)
    yield from _network_manager(host, view)
    if view.is_in_force:
        yield from _drift(view)
        yield from _filters(view.actual)
        yield from _probation(view.state, now_s)
        yield from _daemon(host)


def check_marks_without_policy(host: HostView, actual: Actual) -> Iterator[Finding]:
    """Which marks a policy could use here."""
    used = bits_used(host, (rule.fwmask for rule in actual.foreign_rules))
    names = free_profiles(used)
    seen = f"bits that others use: {used:#010x}"
    if names:
        yield ok("marks", f"{seen}; free profiles (`marks.profile`): {', '.join(names)}")
    else:
        yield warn(
            "marks",
            seen,
            "every mark profile has bits of somebody else",
            f"set `marks.mask` to some of {~used & 0xFFFFFFFF:#010x}",
        )


def _conflicts(view: PolicyView) -> Iterator[Finding]:
    found = find_conflicts(view.actual, view.plan, view.state.record)
    late = tuple(users_of_our_tables(view.actual, view.plan)) if view.is_in_force else ()
    for text in late:
        seen, _, remedy = text.rpartition(": ")
        yield warn("conflict", seen, "it is not ours, so no apply and no daemon takes it away", remedy)
    for text in found:
        seen, _, remedy = text.rpartition(": ")
        yield fail(
            "conflict",
            seen or text,
            "we do not take over what is not ours: an apply is refused"
            + (", and what is in force may be misled by it" if view.is_in_force else ""),
            remedy if seen else "remove one of the two",
        )
    if not found and not late:
        yield ok("conflict", "nobody else uses our marks, rule priorities, tables, devices or filter places")


def _marks(host: HostView, view: PolicyView) -> Iterator[Finding]:
    mask = view.plan.fwmark_mask
    taken = sum(1 for ids in view.plan.ids if ids.fwmark)
    if not taken:
        yield ok("marks", "the policy needs none")
        return
    used = bits_used(host, (rule.fwmask for rule in view.actual.foreign_rules))
    seen = (
        f"{taken} of {capacity(mask)} values of mask {mask:#010x} in use; bits that others use: {used:#010x}"
    )
    if taken >= capacity(mask):
        yield warn(
            "marks", seen, "there is no value left for one more network", "choose a wider `marks.mask`"
        )
    else:
        yield ok("marks", seen)


def _others(view: PolicyView) -> Iterator[Finding]:
    if _CILIUM in view.actual.links:
        yield warn(
            "other agents",
            f"Cilium runs here (device {_CILIUM})",
            "where it replaces kube-proxy, packets pass netfilter by and never meet our chains; and it leaves no"
            " mark bit free",
            "use it without kube-proxy replacement, or keep the VIPs' traffic on nodes without Cilium",
        )
    priorities = {rule.priority for rule in view.plan.rules} & _OVN_PRIORITIES
    if _OVN in view.actual.links and priorities:
        yield fail(
            "other agents",
            f"OVN-Kubernetes runs here, and our block of ip rules holds priority {min(priorities)}",
            "it deletes rules of others at its own priorities 2000 and 6000",
            "set `rules.priority` elsewhere",
        )


def _forwarding(host: HostView, view: PolicyView) -> Iterator[Finding]:
    families: set[int] = {vip.version for network in view.policy.networks for vip in network.vip_prefixes}
    families |= {int(family) for entry in view.plan.egress for family in entry.families}
    off = sorted(family for family in families if not host.forwarding.get(family, True))
    for family in off:
        key = "net.ipv4.ip_forward" if family == 4 else "net.ipv6.conf.all.forwarding"
        yield warn(
            "forwarding",
            f"{key} is 0",
            f"IPv{family} VIPs whose backends are pods cannot be reached; backends on the node itself can"
            + ("; and what pods send (`egress`) goes nowhere" if view.plan.egress else ""),
            f"set {key}=1 (kubelet or the CNI plug-in usually do)",
        )
    if not off:
        yield ok("forwarding", f"on for {', '.join(f'IPv{family}' for family in sorted(families))}")


def _external_tables(view: PolicyView) -> Iterator[Finding]:
    """An empty one is no fault of ours, and yet nobody behind a router is answered."""
    names = {ids.table: ids.name for ids in view.plan.ids}
    for table in view.plan.external_tables:
        example = view.actual.foreign_tables.get(table)
        if example is None:
            yield warn(
                "routes",
                f"nobody has put a route into table {table} of network {names[table]} (`routes: external`)",
                "answers to clients that are no neighbours are refused until somebody does",
                f"look at the routing daemon: is its session up, and does it install what it learns in table {table}?",
            )
        else:
            yield ok("routes", f"table {table} of network {names[table]} has routes of others: {example}")


def _effective(host: HostView, device: str, name: str) -> int:
    """The kernel takes the larger of `all` and the device's own."""
    values = (host.sysctls.get(f"net/ipv4/conf/{place}/{name}", "0") for place in ("all", device))
    return max(int(value) for value in values)


def _named(devices: list[str]) -> str:
    more = f" and {len(devices) - _NAMED} more" if len(devices) > _NAMED else ""
    return ", ".join(devices[:_NAMED]) + more


def _rp_filter(host: HostView, view: PolicyView) -> Iterator[Finding]:
    on = [name for name in view.plan.rp_filter_exempt if _effective(host, name, "rp_filter")]
    dropped = f"the kernel's filter dropped {host.rp_filter_drops} packet(s) since boot"
    if on:
        yield fail(
            "rp_filter",
            f"on for {_named(on)} (the larger of `all` and the device counts); {dropped}",
            "requests whose source is not routed back by the same device are dropped without a word; loose mode,"
            " too, drops all of them on a device without an IPv4 address",
            "`datapath apply`, and find out who sets it: a file in /etc/sysctl.d, or another agent",
        )
    elif view.plan.rp_filter_exempt:
        yield ok("rp_filter", f"off for our devices; {dropped}")


def _arp(host: HostView, view: PolicyView) -> Iterator[Finding]:
    found = False
    for setting in view.plan.sysctls:
        match = _CONF.match(setting.key)
        if match is None or match["name"] not in _ARP:
            continue
        found = True
        effective = _effective(host, match["device"], match["name"])
        if effective != int(setting.value):
            yield warn(
                "arp",
                f"{match['name']} of {match['device']} is in effect {effective}, not {setting.value}",
                "with `strict_arp` a device answers for its own addresses only, so that no other device draws a"
                " VIP's traffic",
                f"set net.ipv4.conf.all.{match['name']} to {setting.value} or less: the larger of the two counts",
            )
            return
    if found:
        yield ok("arp", "`strict_arp` is in effect")


def _src_valid_mark(host: HostView, view: PolicyView) -> Iterator[Finding]:
    """A reply of a pod carries the mark when its source is checked, so it is looked up in the network's table."""
    if not any(rule.fwmask for rule in view.plan.rules):
        return
    devices = sorted({match["device"] for key in host.sysctls if (match := _CONF.match(key))})
    bad = [
        name
        for name in devices
        if name not in {"all", "default", "lo", *view.plan.rp_filter_exempt}
        and _effective(host, name, "src_valid_mark")
        and _effective(host, name, "rp_filter") == 1
    ]
    if bad:
        yield fail(
            "src_valid_mark",
            f"on, with strict rp_filter, for {_named(bad)}",
            "the kernel then checks the source of a pod's reply by the table of the VIP's network, which does not"
            " lead back to the pod, and drops the reply",
            "set net.ipv4.conf.all.src_valid_mark=0 (wg-quick and Tailscale set it), or rp_filter=2 on those",
        )
    else:
        yield ok("src_valid_mark", "in nobody's way")


def _network_manager(host: HostView, view: PolicyView) -> Iterator[Finding]:
    devices = {network.device for network in view.policy.networks}
    managed = sorted(devices & host.managed_by_nm)
    made = sorted({link.name for link in view.plan.links} & host.managed_by_nm)
    if made:
        yield warn(
            "NetworkManager",
            f"manages {_named(made)}, which `vlan:` of the policy makes",
            "two owners of one device: it may take it down or give it another configuration",
            "mark the device unmanaged (`[keyfile] unmanaged-devices=`), or let NetworkManager make it and use"
            " `interface:`",
        )
    elif managed:
        yield ok("NetworkManager", f"manages {_named(managed)}, which the policy only uses")


def _drift(view: PolicyView) -> Iterator[Finding]:
    if view.waiting:
        yield fail(
            "devices",
            f"missing or down: {', '.join(sorted(view.waiting))}",
            "the networks on them are not served",
            "bring them up; they are served as soon as they are there",
        )
    if view.drift:
        yield fail(
            "drift",
            f"{len(view.drift)} difference(s) from the policy in force, first: {view.drift[0].describe()}",
            "the kernel does not do what the policy says",
            "`datapath status` shows all of them, `datapath apply` or the daemon puts them right",
        )
    else:
        yield ok("drift", "none: the kernel is as the policy in force says")


def _filters(actual: Actual) -> Iterator[Finding]:
    if text := filtered_note(actual):
        yield ok("tc filters", text)


def _probation(state: State, now_s: float) -> Iterator[Finding]:
    if state.pending is None:
        yield ok("generation", f"{state.generation} is in force, from {state.policy_name}")
        return
    left = state.pending.deadline_s - now_s
    back = f"generation {state.pending.previous}" if state.pending.previous else "no policy"
    if left > 0:
        yield warn(
            "generation",
            f"{state.generation} is on probation for another {left:.0f} s",
            f"then the node goes back to {back}",
            "`datapath confirm` if it is good",
        )
    else:
        yield fail(
            "generation",
            f"the probation of {state.generation} ended {-left:.0f} s ago, and nobody undid it",
            "whoever held the clock is dead",
            "`datapath rollback`, or `datapath confirm` if it is good; or start the daemon, which undoes it",
        )


def _daemon(host: HostView) -> Iterator[Finding]:
    if host.daemon is None:
        yield warn(
            "daemon",
            "does not run",
            "what others remove stays removed, and no file change is applied",
            "systemctl start datapath, or `datapath run POLICY`",
        )
    else:
        yield ok("daemon", f"runs (pid {host.daemon})")
