# SPDX-License-Identifier: Apache-2.0
"""Every kind of change of a policy, as the policies that are applied in turn.

What all of a kind's policies serve must be served all the time. The lab has two networks with clients; `SPARES` are
networks without any, on devices of their own, so that networks may come and go while others are watched.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any, Final

import yaml

from tools.lab.flows import Flow
from tools.lab.lab import Lab
from tools.lab.topology import Backend, Network

Document = dict[str, Any]
#: Enough to make the tree of ip rules one level deeper, beside the lab's two networks.
SPARES: Final = 4


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of change.

    Attributes:
        policies: texts, applied in turn, the first again after the last.
        serves: whether all of them serve a flow.
    """

    name: str
    policies: tuple[str, ...]
    serves: Callable[[Flow], bool] = lambda _: True


def second_gateway(network: Network) -> tuple[str, str]:
    """Return the router's other addresses on a network: host part 2."""
    return (
        str(network.gateway.v4).rsplit(".", 1)[0] + ".2",
        str(network.gateway.v6).rsplit(":", 1)[0] + ":2",
    )


def prepare(lab: Lab) -> None:
    """Give each network its second gateway, and the node its spare devices."""
    for network in lab.networks:
        v4, v6 = second_gateway(network)
        lab[network.role("router")].ip([f"addr add {v4}/24 dev br-vlan", f"addr add {v6}/64 dev br-vlan"])
    for number in range(SPARES):
        lab.node.ip(
            [
                f"link add spare{number} type veth peer name peer{number}",
                f"link set spare{number} up",
                f"link set peer{number} up",
            ]
        )


def _spare(number: int) -> Document:
    v4, v6 = f"203.0.113.{16 * number}", f"2001:db8:5{number:02x}:"
    return {
        "name": f"spare{number}",
        "interface": f"spare{number}",
        "vips": [f"{v4}/28", f"{v6}:/64"],
        "gateway": [f"203.0.113.{16 * number + 1}", f"{v6}:1"],
    }


def kinds(lab: Lab, **top: Any) -> Iterator[Kind]:
    """Every kind, with `top` (``backend=``, ``steering=``...) at the top level of each policy."""
    base: Document = yaml.safe_load(lab.policy()) | top
    parts = (_networks(base), _gateways(lab, base), _ids(base), _per_network(base), _common(base))
    for kind in itertools.chain(*parts):
        yield _steered_directly(kind) if top.get("steering") == "direct" else kind


def _steered_directly(kind: Kind) -> Kind:
    """Its answers to neighbours of the default device never come to the egress program (docs/design/steering.md)."""
    return dataclasses.replace(kind, serves=lambda flow: "overlap" not in flow.client and kind.serves(flow))


def backend_kinds(lab: Lab) -> Iterator[Kind]:
    """What changes the backend itself."""
    base: Document = yaml.safe_load(lab.policy())
    yield _kind("backend", base | {"backend": "ebpf"}, base | {"backend": "nft"})
    yield _kind(
        "backend and mask",
        base | {"backend": "ebpf"},
        base | {"backend": "nft", "marks": {"mask": 0xF0000000}},
    )


def _kind(name: str, *documents: Document, serves: Callable[[Flow], bool] = lambda _: True) -> Kind:
    return Kind(name, tuple(yaml.safe_dump(document, sort_keys=False) for document in documents), serves)


def _with(base: Document, *spares: int) -> Document:
    return base | {"networks": [*base["networks"], *map(_spare, spares)]}


def _first(base: Document, **keys: Any) -> Document:
    """The first network, which has clients, with other keys."""
    changed = copy.deepcopy(base)
    changed["networks"][0] |= keys
    return changed


def _last(base: Document, **keys: Any) -> Document:
    """The last network, a spare one, with other keys."""
    changed = copy.deepcopy(base)
    changed["networks"][-1] |= keys
    return changed


def _networks(base: Document) -> Iterator[Kind]:
    yield _kind("network added, removed", base, _with(base, 0))
    yield _kind("networks of a deeper tree", base, _with(base, 0, 1, 2, 3), _with(base, 1))
    gone, served = base["networks"][1]["name"], base["networks"][0]["name"]
    yield _kind(
        "served network removed, added",
        base,
        base | {"networks": base["networks"][:1]},
        serves=lambda flow: flow.network == served != gone,
    )
    yield _kind("order of the file", _with(base, 0), base | {"networks": _with(base, 0)["networks"][::-1]})


def _gateways(lab: Lab, base: Document) -> Iterator[Kind]:
    spare = _with(base, 0)
    yield _kind("gateway of another network", spare, _last(spare, gateway=["203.0.113.2", "2001:db8:500::2"]))
    yield _kind("gateway", base, _first(base, gateway=list(second_gateway(lab.networks[0]))))
    vips = base["networks"][0]["vips"]
    more = [*vips, "203.0.113.128/28", "2001:db8:600::/64"]
    yield _kind("VIPs", base, _first(base, vips=more))
    halves = [str(half) for vip in vips for half in ip_network(vip).subnets()]
    in_halves = [_first(policy, vips=halves, on_link=vips) for policy in (base, _with(base, 0, 1, 2))]
    yield _kind("VIP prefixes", _first(base, on_link=vips), *in_halves)
    yield _kind("on_link", base, _first(base, on_link=[*vips, "203.0.113.128/28", "2001:db8:600::/64"]))


def _ids(base: Document) -> Iterator[Kind]:
    yield _kind("mark", base, _first(base, mark=0x00050000), _first(base, mark=0x00100000))
    yield _kind("mask", base, base | {"marks": {"mask": 0xF0000000}}, base | {"marks": {"mask": 0x00FF0000}})
    yield _kind("table", base, _first(base, table=5001), _first(base, table=5002))
    yield _kind("rules.priority", base, base | {"rules": {"priority": 20000}})


def _per_network(base: Document) -> Iterator[Kind]:
    yield _kind(
        "reverse_path",
        base,
        _first(base, reverse_path={"vips": "strict", "other": "loose", "deny": ["198.18.0.0/15"]}),
        _first(base, reverse_path={"vips": "off", "other": "off"}),
        _first(base, reverse_path={"allow": ["10.112.0.0/16"], "deny": ["198.18.0.0/15", "2001:db8:9::/64"]}),
    )
    yield _kind("track", base, _first(base, track="last"))
    spare = _with(base, 0)
    yield _kind(
        "return_path of another network",
        spare,
        _last(spare, return_path="source"),
        _last(spare, return_path="none"),
    )
    name = base["networks"][0]["name"]
    yield _kind(
        "return_path, local sockets",
        base,
        _first(base, return_path="source"),
        # Why TCP is not among them: docs/design/order-and-ownership.md, "What is not hitless".
        serves=lambda flow: (
            flow.network != name or (flow.backend is Backend.HOST_VIP and not flow.kind.startswith("tcp"))
        ),
    )
    yield _kind("strict_arp", base, _first(base, strict_arp=True))


def _common(base: Document) -> Iterator[Kind]:
    internal = [*base["node"]["internal"], "100.64.0.0/10", "fd00:64::/48"]
    yield _kind("node.internal", base, base | {"node": {"internal": internal}})
    yield _kind("all at once", base, _everything(base, internal))


def _everything(base: Document, internal: list[str]) -> Document:
    many = _first(_with(base, 0, 1, 2), mark=0x50000000, table=5003, track="last", strict_arp=True)
    return many | {
        "node": {"internal": internal},
        "marks": {"mask": 0xF0000000},
        "rules": {"priority": 20000},
    }
