# SPDX-License-Identifier: Apache-2.0
"""Random policies, and what happens to them while they are in force."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import yaml
from hypothesis import strategies as st

from datapath.egress_sets import Verb
from datapath.policy import LoadedPolicy, capacity, deposit, parse_policy
from tests.sampling import FULL

DEVICES = 12
CHAINS = 50 if FULL else 25
POLICIES = 10
BACKENDS = st.sampled_from(["ebpf", "nft", "nft"])
MASKS = (0x0FFF0000, 0x00000F00, 0x80402011, 0x0000001F, 0xFFFF0000)


@dataclass(frozen=True)
class Turn:
    """A policy, and what comes after it before the next one.

    Attributes:
        members: changes of sets of `egress`: name, what is done, addresses.
        down: gateways that the daemon finds to be down then, by network.
    """

    policy: LoadedPolicy
    members: tuple[tuple[str, Verb, tuple[str, ...]], ...]
    down: dict[str, tuple[IPv4Address | IPv6Address, ...]]


@st.composite
def addresses(draw: st.DrawFn, number: int) -> dict[str, Any]:
    """VIPs and gateways of either family or both."""
    v4, v6 = f"10.{number}.0", f"2001:db8:{number}:"
    forms4 = [[f"{v4}.0/24"], [f"{v4}.16/28", f"{v4}.64"], [f"{v4}.10-{v4}.29"], [f"{v4}.77"]]
    forms6 = [[f"{v6}:/64"], [f"{v6}:10/124", f"{v6}:77"], [f"{v6}:5-{v6}:9"]]
    families = draw(st.sampled_from(["4", "6", "46"]))
    vips: list[str] = []
    if "4" in families:
        vips += draw(st.sampled_from(forms4))
    if "6" in families:
        vips += draw(st.sampled_from(forms6))
    on_link = [[f"{v4}.0/24", f"{v6}:/64"], [f"{v4}.0/25", "192.0.2.0/24", f"{v6}:/96"]]
    around = {"vips": vips, "on_link": draw(st.sampled_from(on_link))}
    match draw(st.sampled_from(["none", "one", "one", "several", "external"])):
        case "one":
            gateways = [draw(st.sampled_from([f"{v4}.1", ""]))] if "4" in families else []
            gateways += [draw(st.sampled_from([f"{v6}:1", "fe80::1", ""]))] if "6" in families else []
            if any(gateways):
                return {**around, "gateway": [gateway for gateway in gateways if gateway]}
        case "several":
            return {**around, **draw(several(families, v4, v6))}
        case "external":
            return {**around, "routes": "external", "table": 5000 + number}
    return {"vips": vips}


@st.composite
def several(draw: st.DrawFn, families: str, v4: str, v6: str) -> dict[str, Any]:
    """`gateways` of these families, and how they are used."""
    stems = [*([f"{v4}."] if "4" in families else []), *([f"{v6}:", "fe80::"] if "6" in families else [])]
    listed = draw(st.lists(st.sampled_from(stems), min_size=1, max_size=4))
    names = [f"{stem}{position}" for position, stem in enumerate(listed, 1)]
    mode = draw(st.sampled_from(["ecmp", "ecmp", "active_standby"]))
    weights = [draw(st.integers(1, 16)) if mode == "ecmp" else 1 for _ in names]
    gateways = [
        {"address": name, "weight": weight} if weight > 1 else name
        for name, weight in zip(names, weights, strict=True)
    ]
    return {"gateways": gateways, "gateway_mode": mode}


KEYS = st.fixed_dictionaries(
    {},
    optional={
        "return_path": st.sampled_from(["conntrack", "source", "none"]),
        "track": st.sampled_from(["first", "last"]),
        "strict_arp": st.booleans(),
        "reverse_path": st.fixed_dictionaries(
            {
                "vips": st.sampled_from(["feasible", "strict", "off"]),
                "other": st.sampled_from(["strict", "loose", "off"]),
                "allow": st.sampled_from([[], ["203.0.113.0/24", "2001:db8:ffff::/48"]]),
            }
        ),
    },
)


@st.composite
def networks(draw: st.DrawFn, number: int, mask: int) -> dict[str, Any]:
    """A network on device `number`; all that it may say, but nothing that only another kernel could do."""
    network: dict[str, Any] = {
        "name": draw(st.sampled_from([f"n{number}", f"other-{number}", f"save-{number}"])),
        "interface": f"eth{number}",
        **draw(addresses(number)),
        **draw(KEYS),
    }
    if "routes" in network:
        # The plan does not know that table, so these say nothing there.
        network.pop("return_path", None)
        network.get("reverse_path", {}).pop("vips", None)
    if _may_be_isolated(network):
        # What it cannot be together with is refused, and that is tested elsewhere.
        keys: list[dict[str, Any]] = [
            {},
            {},
            {"isolate_clients": True},
            {"isolate_clients": True, "zone": number},
        ]
        network |= draw(st.sampled_from(keys))
    if draw(st.integers(0, 5)) == 0:
        network.setdefault("table", 5000 + number)
    if draw(st.integers(0, 5)) == 0:
        room = min(capacity(mask), 4095)
        network["mark"] = deposit(1 + number * 331 % room, mask)
    return network


def _may_be_isolated(network: dict[str, Any]) -> bool:
    return _leads_out(network) and network.get("track") != "last"


def _leads_out(network: dict[str, Any]) -> bool:
    """By a mark, a rule and a table: for connections from inside, too."""
    follows = network.get("return_path", "conntrack") == "conntrack"
    return follows and bool(network.keys() & {"gateway", "gateways", "routes"})


def _version(network: dict[str, Any]) -> int:
    """A family of which it has a way out."""
    first = (network.get("gateway") or network.get("gateways") or network["vips"])[0]
    return 6 if ":" in (first["address"] if isinstance(first, dict) else first) else 4


@st.composite
def egress(draw: st.DrawFn, among: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Up to three entries, by networks that can carry them."""
    able = [network for network in among if _leads_out(network)]
    entries = []
    for number in range(draw(st.integers(0, 3)) if able else 0):
        network = draw(st.sampled_from(able))
        own = network["interface"].removeprefix("eth")
        v6 = _version(network) == 6
        entry = {
            # What a set remembers is of one family.
            "name": f"e{number}-{'six' if v6 else 'four'}",
            "network": network["name"],
            "source_ip": draw(
                st.sampled_from(["network", f"2001:db8:{own}::99" if v6 else f"10.{own}.0.99"])
            ),
            "sources": [f"fd00:{number}::/64" if v6 else f"172.16.{number}.0/24"],
            "set": draw(st.booleans()),
        }
        if draw(st.booleans()):
            entry["exclude"] = ["2001:db8:aaaa::/48" if v6 else "192.0.2.0/24"]
        entries.append(entry)
    return entries


@st.composite
def policies(draw: st.DrawFn, mask: int, backend: str) -> LoadedPolicy:
    numbers = draw(st.sets(st.integers(1, DEVICES), min_size=1, max_size=DEVICES))
    body: dict[str, Any] = {
        "version": 1,
        "backend": backend,
        "marks": {"mask": mask},
        "networks": [draw(networks(number, mask)) for number in sorted(numbers)],
    }
    if draw(st.booleans()):
        body["node"] = {"internal": ["172.16.0.0/12", "fd00::/8"]}
    if draw(st.integers(0, 4)) == 0:
        body["rules"] = {"priority": draw(st.sampled_from([3000, 20000]))}
    if "node" in body and (entries := draw(egress(body["networks"]))):
        body["egress"] = entries
    # Pins may clash with each other: the policy refuses that, and it is tested elsewhere.
    marks: set[int] = set()
    for network in body["networks"]:
        if network.get("mark") in marks:
            del network["mark"]
        marks.add(network.get("mark", 0))
    return parse_policy(yaml.safe_dump(body).encode(), "random.yaml")


@st.composite
def turns(draw: st.DrawFn, mask: int, backend: str) -> Turn:
    """A policy and what a program and the daemon do before the next one."""
    policy = draw(policies(mask, backend))
    members = []
    for entry in policy.policy.egress:
        for _ in range(draw(st.integers(0, 2)) if entry.set else 0):
            stem = "fd00:17::{}" if entry.name.endswith("six") else "172.17.0.{}"
            numbers = draw(st.sets(st.integers(1, 5), max_size=4))
            chosen = tuple(stem.format(number) for number in sorted(numbers))
            members.append((entry.name, draw(st.sampled_from(list(Verb))), chosen))
    down = {
        network.name: tuple(draw(st.sets(st.sampled_from(network.gateway_addresses), min_size=1)))
        for network in policy.policy.networks
        if network.gateways and draw(st.integers(0, 2)) == 0
    }
    return Turn(policy, tuple(members), down)


@st.composite
def chains(draw: st.DrawFn) -> list[Turn]:
    """Policies that follow each other; the mask and the backend change now and then."""
    mask, backend = draw(st.sampled_from(MASKS)), draw(BACKENDS)
    chain: list[Turn] = []
    for _ in range(POLICIES):
        # Both mean a new program, which costs as much as ten policies.
        if draw(st.integers(0, 39)) == 0:
            mask, backend = draw(st.sampled_from(MASKS)), draw(BACKENDS)
        chain.append(draw(turns(mask, backend)))
    return chain
