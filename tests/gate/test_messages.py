# SPDX-License-Identifier: Apache-2.0
"""How many netlink messages and system calls each kind of apply makes: none may grow unnoticed.

Counted by `datapath.kernel.netlink` itself, which rules, routes, qdiscs, filters and the end of connections go through.
What libnftables, bpf(2) and sysctls need is not in these figures; that an apply without work changes nothing is heard
from the kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from datapath.controller import Controller
from datapath.kernel.netlink import TRAFFIC, Traffic
from datapath.policy import load_policy
from datapath.state import StateDirectory
from tests.netns.nodes import inside, node

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.kernel_feature("tcx")]

NETWORKS: Final = 20
#: Backend, kind of apply -> messages, changes among them, system calls. One network: seven routes and two rules.
BUDGET: Final[dict[str, dict[str, Traffic]]] = {
    "nft": {
        "first": Traffic(249, 198, 177),
        "nothing to do": Traffic(7, 0, 56),
        "add one": Traffic(22, 9, 99),
        "alter one": Traffic(10, 1, 77),
        "remove one": Traffic(21, 10, 98),
    },
    "ebpf": {
        "first": Traffic(272, 198, 370),
        "nothing to do": Traffic(7, 0, 56),
        "add one": Traffic(25, 9, 131),
        "alter one": Traffic(10, 1, 77),
        "remove one": Traffic(24, 10, 124),
    },
}
#: Of the system calls: how many answers fit a buffer is the kernel's business.
ROOM: Final = 0.1
#: Questions: dumps are asked for once more where something changed meanwhile. Changes have no room.
AGAIN: Final = 2
_NETFILTER: Final = 12
_SOL_NETLINK, _ADD_MEMBERSHIP, _NFTABLES, _ALL_ROUTE_GROUPS = 270, 1, 7, 0x7FFFFFFF


def policy(backend: str, networks: int, gateway: int = 1) -> str:
    """The last network's IPv4 gateway is the one that is altered."""
    lines = ["version: 1", f"backend: {backend}", "networks:"]
    for number in range(1, networks + 1):
        host = gateway if number == networks else 1
        lines += [
            f"  - name: n{number}",
            f"    interface: eth{number}",
            f"    vips: [10.1.{number}.0/24, '2001:db8:{number:x}::/64']",
            f"    gateway: [10.1.{number}.{host}, '2001:db8:{number:x}::1']",
        ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Applied:
    """What one apply did.

    Attributes:
        heard: protocols in which the kernel told of a change.
    """

    steps: int
    traffic: Traffic
    heard: frozenset[int]


class User:
    """Applies policies in this namespace and counts."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "policy.yaml"
        self._controller = Controller(StateDirectory(folder / "state"))

    def apply(self, text: str) -> Applied:
        self._file.write_text(text)
        loaded = load_policy(self._file)
        before = dataclasses.replace(TRAFFIC)
        with _listening() as ears:
            steps = len(self._controller.apply(loaded).steps)
            heard = frozenset(protocol for protocol, ear in ears.items() if _has_heard(ear))
        traffic = Traffic(
            TRAFFIC.sent_messages - before.sent_messages,
            TRAFFIC.changes - before.changes,
            TRAFFIC.syscalls - before.syscalls,
        )
        return Applied(steps, traffic, heard)


@contextlib.contextmanager
def _listening() -> Iterator[dict[int, socket.socket]]:
    """To whatever changes links, addresses, neighbours, routes, rules, qdiscs, filters or nf_tables here."""
    with (
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as route,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETFILTER) as netfilter,
    ):
        route.bind((0, _ALL_ROUTE_GROUPS))
        netfilter.bind((0, 0))
        netfilter.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _NFTABLES)
        yield {socket.NETLINK_ROUTE: route, _NETFILTER: netfilter}


def _has_heard(ear: socket.socket) -> bool:
    try:
        return bool(ear.recv(1 << 16, socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno != errno.ENOBUFS:
            raise
        return True  # so much was said that the queue overflowed


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    with node(NETWORKS + 2) as made, inside(made.namespace.name):
        yield User(tmp_path)


@pytest.mark.parametrize("backend", BUDGET)
def test_messages_of_each_kind_of_apply(user: User, backend: str) -> None:
    twenty = policy(backend, NETWORKS)
    kinds = {
        "first": twenty,
        "nothing to do": twenty,
        "add one": policy(backend, NETWORKS + 1),
        "alter one": policy(backend, NETWORKS + 1, gateway=254),
        "remove one": twenty,
    }
    done = {kind: user.apply(text) for kind, text in kinds.items()}
    # Fewer fails, too: a budget that is too large would let the next change through.
    for kind, budget in BUDGET[backend].items():
        traffic = done[kind].traffic
        assert (kind, traffic.changes) == (kind, budget.changes)
        assert abs(traffic.sent_messages - budget.sent_messages) <= AGAIN, (kind, traffic)
        assert abs(traffic.syscalls - budget.syscalls) <= ROOM * budget.syscalls, (kind, traffic)
    assert {kind for kind, one in done.items() if one.steps == 0} == {"nothing to do"}


@pytest.mark.parametrize("backend", BUDGET)
def test_no_op_changes_nothing(user: User, backend: str) -> None:
    first, again = (user.apply(policy(backend, NETWORKS)) for _ in range(2))
    assert first.heard == {socket.NETLINK_ROUTE, _NETFILTER}
    assert again == Applied(0, dataclasses.replace(again.traffic, changes=0), frozenset())


def test_reading_does_not_grow_with_the_networks(user: User) -> None:
    """An apply without work asks the same questions about one network and about all."""
    few, many = (
        [user.apply(policy("auto", networks)) for _ in range(2)][1].traffic for networks in (1, NETWORKS)
    )
    assert abs(few.sent_messages - many.sent_messages) <= AGAIN
    assert few.changes == many.changes == 0
