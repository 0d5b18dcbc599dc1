# SPDX-License-Identifier: Apache-2.0
"""Policies that say what the kernel's rp_filter, iptables' rpfilter match and the classic recipe say: equal verdicts.

The equivalent policies are in docs/design/source-checks.md. Where two disagree, the packet must be one of a
kind that is named here and there. `DATAPATH_NETNS_SEED` repeats a run.
"""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence
from ipaddress import IPv6Network
from pathlib import Path
from typing import Final

import pytest

from datapath.observe.reference import is_martian
from tests.netns.differential.filters import (
    DEFAULTS,
    FILTERED,
    Probe,
    differences,
    iptables,
    kernel,
    nothing,
    passed,
    policy,
    probes,
    recipe,
)
from tests.netns.differential.ground import Number
from tools.lab import classic, topology

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow]

SEED: Final = int(os.environ.get("DATAPATH_NETNS_SEED", str(random.SystemRandom().getrandbits(32))))
PROBES: Final = 800
#: Of one version, `strict` passes 30 to 60 of these, whatever the seed.
ENOUGH: Final = 20
BACKENDS: Final = ("ebpf", "nft")
TOOLS: Final[tuple[classic.Tool, ...]] = ("iptables-legacy", "iptables-nft")
ROUTES: Final = tuple(DEFAULTS)

#: The source lists are to decide nothing: what is denied by default is allowed, but for the node's own IPv4 addresses:
#: `accept_local` leaves these to our list, and what the kernel does without it is to deny them, too.
EQUIVALENT: Final = """\
version: 1
backend: {backend}
networks:
  - name: public
    interface: net0
    vips: [198.51.100.0/24, "2001:db8:2::/64"]
    gateway: [198.51.100.1, "2001:db8:2::1"]
    reverse_path:
      vips: "off"
      other: {other}
      allow:
        - 198.51.100.0/24
        - "2001:db8:2::/64"
        - "2001:db8:2::10"
        - "2001:db8:ff:0::1"
        - "2001:db8:ff:1::1"
"""
_NETWORK: Final = dataclasses.replace(
    topology.network(), device=FILTERED, gateway=topology.pair("198.51.100.1", "2001:db8:2::1")
)
_LINK_LOCAL: Final = IPv6Network("fe80::/10")


def explanation(probe: Probe, *, ours_passes: bool) -> str:
    """Why only one of the two lets the packet through; empty if nothing explains it."""
    if not ours_passes and is_martian(probe.source):
        # Routed like any other by the kernel: 0.0.0.1, 240/4, IPv4-compatible and IPv4-mapped IPv6 addresses.
        return "martian"
    if ours_passes and probe.source.version == 6 and probe.source in _LINK_LOCAL:
        # Never forwarded, so it cannot be spoofed from farther than the link; neighbour discovery needs it.
        return "link-local"
    return ""


def assert_equal(sent: Sequence[Probe], ours: frozenset[Number], theirs: frozenset[Number]) -> None:
    """No difference without an explanation; and enough of both outcomes, or it would prove nothing."""
    odd = differences(sent, ours, theirs)
    unexplained = [probe for probe in odd if not explanation(probe, ours_passes=probe.number in ours)]
    assert not unexplained, "\n".join(
        [f"seed {SEED}:"]
        + [
            f"{probe.source} -> {probe.destination}: only {'ours' if probe.number in ours else 'theirs'} passes"
            for probe in unexplained[:20]
        ]
    )
    both = ours & theirs
    assert len(both) >= ENOUGH
    assert len(sent) - len(both) - len(odd) >= ENOUGH


def sample(*, to_vips: float) -> list[Probe]:
    return probes(random.Random(SEED), PROBES, to_vips=to_vips)


def by_backend(text: str, state: Path, routes: str, sent: Sequence[Probe]) -> list[frozenset[Number]]:
    """What passes with this policy, done by each backend."""
    return [
        passed(DEFAULTS[routes], policy(text.format(backend=backend), backend, state / backend), sent)
        for backend in BACKENDS
    ]


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize(("other", "rp_filter", "options"), [("strict", 1, ()), ("loose", 2, ("--loose",))])
def test_other_says_what_the_kernel_says(
    tmp_path: Path, routes: str, other: str, rp_filter: int, options: tuple[str, ...]
) -> None:
    sent = sample(to_vips=0)
    of_ours = by_backend(EQUIVALENT.replace("{other}", other), tmp_path, routes, sent)
    rivals = {
        (4,): [kernel(rp_filter)],  # IPv6 has no such sysctl
        (4, 6): [iptables(tool, *options) for tool in TOOLS],
    }
    for versions, installs in rivals.items():
        compared = [probe for probe in sent if probe.number.version in versions]
        for install in installs:
            theirs = passed(DEFAULTS[routes], install, compared)
            for ours in of_ours:
                assert_equal(compared, ours, theirs)


@pytest.mark.parametrize("routes", ROUTES)
def test_the_classic_recipe_has_an_equivalent_policy(tmp_path: Path, routes: str) -> None:
    sent = sample(to_vips=0.5)
    of_ours = by_backend(EQUIVALENT.replace("{other}", "strict"), tmp_path, routes, sent)
    for tool in TOOLS:
        theirs = passed(DEFAULTS[routes], recipe(tool, _NETWORK), sent)
        for ours in of_ours:
            assert_equal(sent, ours, theirs)


def test_without_a_filter_the_same_packets_pass() -> None:
    """Everything above would agree if the packets were dropped anyway, or if nothing was checked."""
    sent = sample(to_vips=0.5)
    free = passed(DEFAULTS["default-by-another"], nothing(), sent)
    filtered = passed(DEFAULTS["default-by-another"], recipe("iptables-nft", _NETWORK), sent)
    assert filtered < free
    assert len(free - filtered) >= PROBES // 10
