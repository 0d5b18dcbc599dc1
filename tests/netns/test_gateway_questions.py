# SPDX-License-Identifier: Apache-2.0
"""Questions to gateways as a neighbour sees them: who is asked, in whose name, and who learns what from it."""

from __future__ import annotations

import itertools
import json
import select
import socket
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from datapath.kernel.carrier import NO_CARRIER, has_carrier
from datapath.kernel.gateway_questions import Questions, questions
from datapath.plan.gateways import CheckMethod, GatewayCheck
from datapath.service.gateways import GatewayWatch
from tests.service.daemon import wait_until
from tools.lab.netns import Namespace, new_prefix, remove

pytestmark = pytest.mark.root

PATIENCE_S = 10.0
NODE, ROUTER = "02:00:00:00:00:01", "02:00:00:00:00:02"
GATEWAY = {4: ip_address("10.9.0.1"), 6: ip_address("2001:db8:9::1")}
OWN = {4: ip_address("10.9.0.9"), 6: ip_address("2001:db8:9::9")}
BROADCAST = bytes.fromhex("ffffffffffff")
ETH_P_ALL = 3
Address = IPv4Address | IPv6Address


class Link:
    """A node and a router, and what the router's side of the wire sees of the node."""

    def __init__(self) -> None:
        prefix = new_prefix()
        self.node, self.router = Namespace(f"{prefix}n"), Namespace(f"{prefix}r")
        for namespace in (self.node, self.router):
            namespace.create()
        # Linux is slow to bring up pairs whose ends have one number: it takes them for devices without another below.
        peer = f"peer name eth0 index 6 address {ROUTER} netns {self.router.name}"
        self.node.ip([f"link add eth0 index 5 address {NODE} type veth {peer}"])
        self.router.ip(
            [
                "link set eth0 up",
                "addr add 10.9.0.1/24 dev eth0",
                "-6 addr add 2001:db8:9::1/64 dev eth0 nodad",
            ]
        )
        self.node.ip(["link set eth0 up"])
        for namespace in (self.node, self.router):
            namespace.settle()
        self.wire = self.router.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.wire.bind(("eth0", ETH_P_ALL))

    def close(self) -> None:
        self.wire.close()
        for namespace in (self.node, self.router):
            remove(namespace.name)

    def open(self, family: int, method: CheckMethod = CheckMethod.NEIGHBOUR) -> Questions:
        return self.node.call(lambda: questions("eth0", family, method))

    def ask(self, asker: Questions, *, everybody: bool) -> None:
        """Sources are looked up in the node's namespace; the device may come up a moment later."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.node.call(lambda: asker.ask(GATEWAY[asker.family], everybody=everybody))
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def frames(self) -> list[bytes]:
        """What the node has sent since the last call."""
        found = []
        while select.select([self.wire], [], [], 0.1)[0]:
            frame, sender = self.wire.recvfrom(2048)
            if sender[2] != socket.PACKET_OUTGOING and frame[6:12] == bytes.fromhex(NODE.replace(":", "")):
                found.append(frame)
        return found

    def operstate(self) -> str:
        return str(json.loads(self.node.run("ip", "-j", "link", "show", "dev", "eth0"))[0]["operstate"])

    def neighbours_of_router(self) -> str:
        return self.router.run("ip", "neigh", "show", "dev", "eth0")


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    yield made
    made.close()


def answered(asker: Questions) -> set[Address]:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        found = asker.answers()
        if found:
            return found
        time.sleep(0.01)
    return set()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("method", [CheckMethod.NEIGHBOUR, CheckMethod.ICMP])
def test_who_is_there_answers_and_who_is_gone_does_not(link: Link, family: int, method: CheckMethod) -> None:
    link.node.ip(
        [f"-{family} addr add {OWN[family]}/{24 if family == 4 else 64} dev eth0" + " nodad" * (family == 6)]
    )
    asker = link.open(family, method)
    try:
        link.ask(asker, everybody=False)
        assert answered(asker) == {GATEWAY[family]}
        # Its link stays: a question that cannot get out is another matter.
        link.router.ip(["addr flush dev eth0"])
        link.ask(asker, everybody=False)
        time.sleep(0.3)
        assert asker.answers() == set()
    finally:
        asker.close()


@pytest.mark.parametrize("family", [4, 6])
def test_all_are_asked_once_and_then_the_gateway_alone(link: Link, family: int) -> None:
    asker = link.open(family)
    protocol, size = ((0x0806, 28), (0x86DD, 72))[family == 6]
    try:
        seen = []
        for _ in range(4):
            link.ask(asker, everybody=False)
            assert answered(asker) == {GATEWAY[family]}
            seen += [f for f in link.frames() if int.from_bytes(f[12:14]) == protocol and _is_question(f)]
        link.ask(asker, everybody=True)
        seen += [f for f in link.frames() if int.from_bytes(f[12:14]) == protocol and _is_question(f)]
    finally:
        asker.close()
    router = bytes.fromhex(ROUTER.replace(":", ""))
    everybody = BROADCAST if family == 4 else b"\x33\x33\xff" + GATEWAY[6].packed[-3:]
    assert [frame[:6] for frame in seen] == [everybody, router, router, router, everybody]
    assert all(len(frame) >= 14 + size for frame in seen)


def _is_question(frame: bytes) -> bool:
    """ARP request, neighbour solicitation."""
    if frame[12:14] == b"\x08\x06":
        return frame[20:22] == b"\0\1"
    return frame[20] == socket.IPPROTO_ICMPV6 and frame[54] == 135 and frame[62:78] == GATEWAY[6].packed


def test_a_device_without_an_address_tells_nobody_anything(link: Link) -> None:
    asker = link.open(4)
    try:
        link.ask(asker, everybody=False)
        assert answered(asker) == {GATEWAY[4]}
    finally:
        asker.close()
    (frame,) = [frame for frame in link.frames() if frame[12:14] == b"\x08\x06"]
    assert frame[28:32] == bytes(4), "sender"
    assert "10.9." not in link.neighbours_of_router()
    assert str(IPv4Address(0)) not in link.neighbours_of_router()


def test_the_sender_is_the_devices_own_address_there(link: Link) -> None:
    link.node.ip(
        [f"addr add {OWN[4]}/24 dev eth0", "addr add 192.0.2.9/24 dev eth0", "addr add 10.9.0.77/32 dev lo"]
    )
    asker = link.open(4)
    try:
        link.ask(asker, everybody=False)
        assert answered(asker)
    finally:
        asker.close()
    senders = {frame[28:32] for frame in link.frames() if frame[12:14] == b"\x08\x06" and _is_question(frame)}
    assert senders == {OWN[4].packed}


def test_neighbour_discovery_is_asked_from_the_link_local_address_or_the_subnets(link: Link) -> None:
    asker = link.open(6)
    try:
        link.ask(asker, everybody=False)
        assert answered(asker)
    finally:
        asker.close()
    senders = {ip_address(f[22:38]) for f in link.frames() if f[12:14] == b"\x86\xdd" and _is_question(f)}
    assert len(senders) == 1
    assert all(sender.is_link_local for sender in senders)


def test_echo_needs_an_address_on_the_gateways_subnet(link: Link) -> None:
    link.node.ip(["addr add 192.0.2.9/24 dev eth0"])
    asker = link.open(4, CheckMethod.ICMP)
    try:
        with pytest.raises(OSError, match="no address on the gateway's subnet"):
            link.node.call(lambda: asker.ask(GATEWAY[4], everybody=False))
    finally:
        asker.close()


def test_answers_to_others_do_not_count(link: Link) -> None:
    """A reply that the router broadcasts, an advertisement that nobody asked for, a ping of somebody else."""
    link.node.ip([f"addr add {OWN[4]}/24 dev eth0"])
    askers = [link.open(4), link.open(6), link.open(4, CheckMethod.ICMP)]
    try:
        link.router.sysctl({"net/ipv4/conf/eth0/arp_notify": 1, "net/ipv6/conf/eth0/ndisc_notify": 1})
        link.router.ip(["link set eth0 down", "link set eth0 up"])
        link.node.run("ping", "-c", "1", "-W", "5", str(GATEWAY[4]))
        time.sleep(0.5)
        # The ping resolved the address: one ARP reply to us is real, and says that the gateway is there.
        assert [asker.answers() for asker in askers[1:]] == [set(), set()]
    finally:
        for asker in askers:
            asker.close()


@pytest.mark.parametrize("family", [4, 6])
def test_a_link_that_is_down_cannot_be_asked_by(link: Link, family: int) -> None:
    """Not even a moment after its carrier is back: without a queue, Linux drops what is sent."""
    asker = link.open(family)
    try:

        def is_answered() -> bool:
            # The other end may have no queue yet.
            link.ask(asker, everybody=True)
            time.sleep(0.1)
            return asker.answers() == {GATEWAY[family]}

        for _ in range(2):
            wait_until(is_answered, "it answers")
            link.router.ip(["link set eth0 down"])
            wait_until(lambda: link.operstate() != "UP", "the link watch has seen it")
            with pytest.raises(OSError, match="no carrier"):
                link.node.call(lambda: asker.ask(GATEWAY[family], everybody=False))
            link.router.ip(["link set eth0 up"])
            if family == 6:
                link.router.ip(["-6 addr replace 2001:db8:9::1/64 dev eth0 nodad"])
    finally:
        asker.close()


@pytest.mark.parametrize(
    "kind",
    [
        "",
        *(
            pytest.param(k, marks=pytest.mark.kernel_feature(feature))
            for k, feature in (("vlan", "8021q"), ("macvlan", "macvlan"))
        ),
    ],
)
def test_a_carrier_that_is_gone_is_seen_at_once_on_the_devices_above_it_too(link: Link, kind: str) -> None:
    """The link watch tells a VLAN of it up to a second later, if any device of the machine changed before."""
    device = kind and "upper0"
    if kind:
        number = " id 5" if kind == "vlan" else ""
        link.node.ip([f"link add link eth0 name upper0 type {kind}{number}", "link set upper0 up"])
    index = link.node.call(lambda: socket.if_nametoindex(device or "eth0"))
    wait_until(lambda: link.node.call(lambda: has_carrier(index)), "it has a carrier")
    for _ in range(5):
        link.router.ip(["link set eth0 down"])
        assert not link.node.call(lambda: has_carrier(index))
        link.router.ip(["link set eth0 up"])
        wait_until(lambda: link.node.call(lambda: has_carrier(index)), "it is back")
    link.node.ip([f"link del {device or 'eth0'}"])
    assert not link.node.call(lambda: has_carrier(index))


@pytest.mark.vm
@pytest.mark.kernel_feature("dummy")
def test_a_carrier_that_the_link_watch_has_not_seen_is_no_miss() -> None:
    """As on hardware: events of a device that is no end of a pair wait until a second after the last one."""
    namespace = Namespace(f"{new_prefix()}w")
    namespace.create()
    check = GatewayCheck("n", "d0", GATEWAY[4], CheckMethod.NEIGHBOUR, 0.2, 3, 5, 5.0)
    watch = GatewayWatch()
    try:
        namespace.ip(["link add d0 type dummy", "link add d1 type dummy", "link set d0 up", "link set d1 up"])
        watch.follow((check,), {}, 0.0)
        clock = itertools.count()
        for lost in (False, True):
            if lost:
                namespace.ip(["link set d1 carrier off", "link set d0 carrier off"])
            changes = [change for _ in range(9) for change in namespace.call(lambda: watch.ask(next(clock)))]
            # Nobody answers behind a dummy. One question was under way when the carrier went.
            assert [(change.is_up, change.problem) for change in changes] == (
                [(True, NO_CARRIER)] if lost else [(False, "")]
            )
            if not lost:
                watch.follow((), {}, 0.0)
                watch.follow((check,), {}, 0.0)
    finally:
        watch.close()
        remove(namespace.name)


def test_a_device_that_has_no_neighbours_is_refused() -> None:
    namespace = Namespace(f"{new_prefix()}lo")
    namespace.create()
    try:
        with pytest.raises(OSError, match="no neighbours"):
            namespace.call(lambda: questions("lo", 4, CheckMethod.NEIGHBOUR))
    finally:
        remove(namespace.name)
