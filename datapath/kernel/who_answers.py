# SPDX-License-Identifier: Apache-2.0
"""Who answers for addresses on the node's networks, asked once, for `doctor`."""

from __future__ import annotations

import time
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv6Address
from typing import Final, NamedTuple

from datapath.kernel.devices import GETLINK, IFINFOMSG
from datapath.kernel.gateway_questions import Questions
from datapath.kernel.gateway_wires import Wire
from datapath.kernel.netlink import Netlink
from datapath.kernel.netlink_messages import attributes
from datapath.plan.gateways import CheckMethod

Address = IPv4Address | IPv6Address

_ROUNDS: Final = 3
_ROUND_S: Final = 0.3
_POLL_S: Final = 0.01
_NO_WORD: Final = "FRR has not answered in time: ask again"
_IFLA_ADDRESS: Final = 1


class Question(NamedTuple):
    """Who has this address on this device?"""

    device: str
    address: Address
    method: CheckMethod = CheckMethod.NEIGHBOUR
    bfd_socket: str = ""


class Answer(NamedTuple):
    """What came back.

    Attributes:
        is_there: somebody answered.
        link_address: of a neighbour that did; empty for an echo reply.
        is_own: that is a device of this node.
        problem: why nobody could be asked.
    """

    is_there: bool = False
    link_address: str = ""
    is_own: bool = False
    problem: str = ""


def who_answers(asked: Iterable[Question]) -> dict[Question, Answer]:
    """Ask all at once; takes under a second where somebody does not answer."""
    wires: dict[Wire, Questions] = {}
    found: dict[Question, Answer] = {}
    waiting = list(dict.fromkeys(asked))
    try:
        for round_ in range(_ROUNDS):
            for question in waiting:
                problem = _ask(wires, question, is_again=round_ > 0)
                found[question] = Answer(problem=problem)
            waiting = _listen(wires, waiting, found)
        for question in waiting:
            if problem := _trouble(wires.get(_wire(question)), question.address):
                found[question] = Answer(problem=problem)
    finally:
        for wire in wires.values():
            wire.close()
    own = _own_link_addresses() if any(answer.link_address for answer in found.values()) else frozenset()
    return {
        question: answer._replace(is_own=answer.link_address in own) for question, answer in found.items()
    }


def _wire(question: Question) -> Wire:
    return Wire(question.device, question.address.version, question.method, question.bfd_socket)


def _trouble(wire: Questions | None, address: Address) -> str:
    if wire is None:
        return ""
    return wire.trouble(address) or (_NO_WORD if wire.is_waiting() else "")


def _ask(wires: dict[Wire, Questions], question: Question, *, is_again: bool) -> str:
    """Why it could not be asked."""
    key = _wire(question)
    try:
        if key not in wires:
            wires[key] = key.open()
        wires[key].ask(question.address, everybody=is_again)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _listen(
    wires: dict[Wire, Questions],
    waiting: list[Question],
    found: dict[Question, Answer],
) -> list[Question]:
    """Wait for this round's answers; those who did not answer."""
    end = time.monotonic() + _ROUND_S
    while waiting and time.monotonic() < end:
        answers = {key: wire.answers() for key, wire in wires.items()}
        for question in waiting:
            key = _wire(question)
            if question.address in answers.get(key, ()):
                found[question] = Answer(True, wires[key].link_address(question.address).hex(":"))
        waiting = [question for question in waiting if not found[question].is_there]
        time.sleep(_POLL_S)
    return waiting


def _own_link_addresses() -> frozenset[str]:
    with Netlink() as netlink:
        bodies = netlink.dump("devices", GETLINK, IFINFOMSG.pack(0, 0, 0, 0, 0))
    found = (dict(attributes(body, IFINFOMSG.size)).get(_IFLA_ADDRESS, b"") for body in bodies)
    return frozenset(address.hex(":") for address in found if address)
