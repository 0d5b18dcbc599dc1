# SPDX-License-Identifier: Apache-2.0
"""Checks of the node itself, which need no policy. Pure: from what was seen to findings."""

from __future__ import annotations

from collections.abc import Iterator

from datapath.kernel.host import DirectoryView, HostView
from datapath.observe.findings import Finding, fail, ok, warn
from datapath.policy.marks import PROFILES, MarkProfile

#: Numbers of linux/capability.h.
_NET_ADMIN, _NET_RAW, _SYS_ADMIN, _PERFMON, _BPF = 12, 13, 21, 38, 39
#: One apply writes a few tens of kilobytes; 4,000 networks some megabytes.
_ROOM_NEEDED = 64 * 1024
_ROOM_WANTED = 8 * 1024 * 1024
_NEARLY_FULL = 0.8
_ALL_BITS = 0xFFFFFFFF

#: What is lost without a kernel feature, and what to do.
_FEATURES: dict[str, tuple[bool, str, str]] = {
    "nft": (
        True,
        "nothing can be applied",
        "load or build nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)",
    ),
    "nft ct": (
        True,
        "replies cannot follow their connection",
        "load nf_conntrack and nft_ct (CONFIG_NFT_CT), or use `return_path: source`",
    ),
    "nft vmap": (True, "marks cannot be saved", "use a kernel of 5.10 or later"),
    "nft route chain": (
        True,
        "replies of sockets on this node (host-network backends) leave by the default route",
        "build nft_chain_route (in nf_tables since 5.2)",
    ),
    "nft egress": (
        False,
        "a policy with `egress` cannot be applied",
        "load nft_chain_nat, nft_nat, nft_hash, nft_fib_inet, nft_log and nfnetlink_log",
    ),
    "nft fib": (
        False,
        "the nftables backend cannot check sources: only eBPF can serve here",
        "load nft_fib_inet (CONFIG_NFT_FIB_INET)",
    ),
    "ebpf": (
        False,
        "`backend: auto` falls back to nftables, `backend: ebpf` is refused",
        "give it CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and a kernel without lockdown; install bpfcc and libbpf1",
    ),
}


def check_host(host: HostView, *, uses_rules: bool) -> Iterator[Finding]:
    """Findings about the node.

    Args:
        host: what was seen.
        uses_rules: ip rules of ours are in force, so that whoever removes them breaks something now.
    """
    yield from _capabilities(host)
    yield from _features(host)
    yield from _networkd(host, uses_rules=uses_rules)
    yield from _conntrack(host)
    yield from _directory(host.directory)


def _capabilities(host: HostView) -> Iterator[Finding]:
    def has(number: int) -> bool:
        return bool(host.capabilities >> number & 1)

    if not has(_NET_ADMIN):
        yield fail(
            "capabilities",
            "CAP_NET_ADMIN is missing",
            "nothing can be applied or healed, and what follows here is only what a normal user sees",
            "run it as root, or give the service CAP_NET_ADMIN",
        )
        return
    missing = {}
    if not has(_SYS_ADMIN) and not (has(_BPF) and has(_PERFMON)):
        missing["CAP_BPF and CAP_PERFMON (or CAP_SYS_ADMIN)"] = "the eBPF program cannot be loaded"
    elif not has(_SYS_ADMIN):
        missing["CAP_SYS_ADMIN"] = "a loaded eBPF program is not found again after a restart"
    if not has(_NET_RAW):
        missing["CAP_NET_RAW"] = "marks that iptables-legacy rules write are not seen"
    if missing:
        yield warn(
            "capabilities",
            f"missing: {', '.join(missing)}",
            "; ".join(missing.values()),
            "add them to CapabilityBoundingSet= of the service, or use `backend: nft`",
        )
    else:
        yield ok("capabilities", "all that are needed")


def _features(host: HostView) -> Iterator[Finding]:
    if "nft" not in host.features:
        yield warn(
            "kernel: nft",
            "not tried: no network namespace can be made here",
            "whether the kernel has all that is needed is not known",
            "run it as root (CAP_SYS_ADMIN)",
        )
    for name, reason in host.features.items():
        check = f"kernel: {name}"
        if not reason:
            yield ok(check, "works")
            continue
        is_needed, matters, remedy = _FEATURES[name]
        yield (fail if is_needed else warn)(check, reason, matters, remedy)


def _networkd(host: HostView, *, uses_rules: bool) -> Iterator[Finding]:
    networkd = host.networkd
    if networkd is None:
        yield ok("systemd-networkd", "does not run here")
        return
    removed = {"ManageForeignRoutingPolicyRules": "ip rules", "ManageForeignRoutes": "routes"}
    bad = {name: origin for name, (value, origin) in networkd.manages.items() if value}
    if bad:
        seen = ", ".join(f"{name}=yes ({origin})" for name, origin in bad.items())
        yield (fail if uses_rules else warn)(
            "systemd-networkd",
            f"runs (pid {networkd.pid}) with {seen}",
            f"whenever it starts or reloads it deletes {' and '.join(removed[name] for name in bad)} of others:"
            " replies leave by the default route until the daemon has put them back",
            f"set {', '.join(f'{name}=no' for name in bad)} in a drop-in in /etc/systemd/networkd.conf.d/"
            " (the package brings one) and restart systemd-networkd",
        )
    elif networkd.changed_since:
        yield warn(
            "systemd-networkd",
            f"runs (pid {networkd.pid}) since before {', '.join(networkd.changed_since)}",
            "it reads its configuration when it starts: it may still delete ip rules and routes of others",
            "restart systemd-networkd once",
        )
    else:
        yield ok("systemd-networkd", "leaves ip rules and routes of others alone")


def _conntrack(host: HostView) -> Iterator[Finding]:
    if host.conntrack is None:
        yield ok("conntrack", "no limit can be seen: nobody uses connection tracking here yet")
        return
    count, most = host.conntrack
    seen = f"{count} of {most} entries"
    matters = "without an entry a new connection is dropped, or its reply leaves by the default route"
    remedy = "raise net.netfilter.nf_conntrack_max, and find out who opens so many (`conntrack -S`)"
    if most and count >= most:
        yield fail("conntrack", f"full: {seen}", matters, remedy)
    elif most and count >= _NEARLY_FULL * most:
        yield warn("conntrack", f"nearly full: {seen}", matters, remedy)
    else:
        yield ok("conntrack", seen)


def _directory(view: DirectoryView) -> Iterator[Finding]:
    check, mib = "state directory", view.free_bytes / (1 << 20)
    if view.damage:
        yield fail(check, view.damage, "nothing can be applied, rolled back or torn down", view.damage_hint)
    elif not view.is_writable:
        yield fail(
            check,
            f"{view.path} cannot be written",
            "what is in force is healed, but nothing can be applied, rolled back or torn down",
            "mount it writable, or run it as root; or choose another with --state-dir",
        )
    elif view.free_bytes < _ROOM_NEEDED:
        yield fail(
            check,
            f"{view.path}: {mib:.2f} MiB free",
            "what is in force is healed, but nothing can be applied or rolled back, also not by a missed"
            " confirmation",
            "make room on that file system",
        )
    elif view.free_bytes < _ROOM_WANTED:
        yield warn(check, f"{view.path}: {mib:.1f} MiB free", "the next policies may not fit", "make room")
    else:
        yield ok(
            check, f"{view.path}: writable, {mib:.0f} MiB free" + ("" if view.is_there else ", not made yet")
        )


def free_profiles(used: int) -> tuple[MarkProfile, ...]:
    """Mark profiles whose bits nobody uses."""
    return tuple(name for name, profile in PROFILES.items() if not profile.mask & used)


def bits_used(host: HostView, fwmasks: Iterator[int]) -> int:
    """Mark bits that rules of others set or compare; whole-mark rules say nothing about single bits."""
    used = 0
    for mark in host.marks:
        used |= mark.chosen
    for fwmask in fwmasks:
        used |= 0 if fwmask == _ALL_BITS else fwmask
    return used
