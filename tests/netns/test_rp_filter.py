# SPDX-License-Identifier: Apache-2.0
"""Whatever rp_filter was before: clients get their replies, and every other device is checked as strictly as ever.

Veth devices stand for VLANs here; the same with real ones is for the virtual machines.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final

import pytest

from datapath.controller import Controller
from datapath.policy import parse_policy
from datapath.state import StateDirectory
from tests.bpf import packets
from tests.netns.differential.ground import ROUTED, Ground, Nft, Number, ground, rp_filter, until
from tests.netns.differential.traffic import numbered4

pytestmark = [pytest.mark.root, pytest.mark.bpf]

OURS, OTHER, QUIET = "net0", "net1", "net2"
LINES: Final = (
    f"addr add 172.31.1.1/24 dev {OTHER}",
    f"addr add 2001:db8:ff:1::1/64 dev {OTHER}",
    f"addr add 172.31.2.1/24 dev {QUIET}",
    "addr add 198.51.100.10/32 dev lo",
    "addr add 2001:db8:2::10/128 dev lo",
    # The client's way by the main table is not the network that it asks by.
    f"route add 203.0.113.0/24 via 172.31.1.254 dev {OTHER}",
    f"-6 route add 2001:db8:3::/48 via 2001:db8:ff:1::fe dev {OTHER}",
    f"route add 192.0.2.0/24 dev {QUIET}",
    *(
        f"neigh add {address} lladdr {packets.PEER_MAC.hex(':')} dev {device} nud permanent"
        for address, device in (
            ("198.51.100.1", OURS),
            ("2001:db8:2::1", OURS),
            ("172.31.1.254", OTHER),
            ("2001:db8:ff:1::fe", OTHER),
        )
    ),
)
POLICY: Final = """\
version: 1
backend: {backend}
networks:
  - name: public
    interface: net0
    vips: [198.51.100.0/24, "2001:db8:2::/64"]
    gateway: [198.51.100.1, "2001:db8:2::1"]
"""
#: To the unrelated device, by what lets them in: nothing stricter than off, loose, strict.
NOWHERE, ASYMMETRIC, LEGITIMATE = "100.66.0.9", "192.0.2.9", "172.31.1.9"
PASSES: Final = {
    0: frozenset({NOWHERE, ASYMMETRIC, LEGITIMATE}),
    2: frozenset({ASYMMETRIC, LEGITIMATE}),
    1: frozenset({LEGITIMATE}),
}
CLIENTS: Final = (("203.0.113.9", "198.51.100.10"), ("2001:db8:3::9", "2001:db8:2::10"))
_LAST: Final = 9999


@pytest.fixture(scope="module", params=["without an address", "with an address"])
def field(request: pytest.FixtureRequest) -> Iterator[Ground]:
    """The node; its VLAN device with an IPv4 address or, as usual with MetalLB, without one."""
    own = [f"addr add 172.31.0.1/24 dev {OURS}"] if request.param == "with an address" else []
    with ground((OURS, OTHER, QUIET), (*own, *LINES)) as built:
        built.observe(ROUTED, devices=(OTHER, QUIET))
        yield built


@pytest.fixture
def controller(field: Ground, tmp_path: Path) -> Iterator[Controller]:
    """Of a node that has no policy before and after the test."""
    assert field.devices
    made = Controller(StateDirectory(tmp_path))
    yield made
    made.teardown()


def sysctls() -> dict[str, str]:
    """Every rp_filter, and what would weaken marks or local sources, as it is now."""
    return {
        str(path): path.read_text()
        for name in ("rp_filter", "accept_local", "src_valid_mark", "arp_ignore", "arp_announce")
        for path in sorted(Path("/proc/sys/net/ipv4/conf").glob(f"*/{name}"))
    }


def effective(device: str) -> int:
    conf = Path("/proc/sys/net/ipv4/conf")
    return max(int((conf / name / "rp_filter").read_text()) for name in ("all", device))


def refused() -> int:
    """How many packets the kernel's own check has dropped in this namespace (`TcpExtIPReversePathFilter`)."""
    names, values = (
        line.split()
        for line in Path("/proc/thread-self/net/netstat").read_text().splitlines()
        if line.startswith("TcpExt:")
    )
    return int(dict(zip(names, values, strict=True))["IPReversePathFilter"])


def let_in(field: Ground) -> frozenset[str]:
    """Which sources the unrelated device lets in now; what it does not, the kernel's own counter has counted."""
    sources = {Number(4, n): source for n, source in enumerate((NOWHERE, ASYMMETRIC, LEGITIMATE), start=1)}
    nft, before, seen = Nft(), refused(), set[Number]()
    nft.seen()
    for number, source in sources.items():
        frame = numbered4(packets.ipv4(source, "172.31.1.1", packets.udp()), number.value)
        field.send(OTHER, packets.frame(packets.ETH_P_IP, frame))

    def is_settled() -> bool:
        seen.update(nft.seen())
        return len(seen) + refused() - before >= len(sources)

    assert until(is_settled)
    assert len(seen) + refused() - before == len(sources)
    return frozenset(sources[number] for number in seen)


def echo_request(source: str, destination: str) -> bytes:
    """A frame with an echo request of either family."""
    if ip_address(source).version == 4:
        body = struct.pack("!BBHHH", 8, 0, 0, 7, 1)
        body = body[:2] + struct.pack("!H", packets.checksum(body)) + body[4:]
        return packets.frame(packets.ETH_P_IP, packets.ipv4(source, destination, body, protocol=1))
    body = struct.pack("!BBHHH", 128, 0, 0, 7, 1)
    pseudo = IPv6Address(source).packed + IPv6Address(destination).packed + struct.pack("!II", len(body), 58)
    body = body[:2] + struct.pack("!H", packets.checksum(pseudo + body)) + body[4:]
    return packets.frame(packets.ETH_P_IPV6, packets.ipv6(source, destination, body, next_header=58))


def is_reply(frame: bytes, client: str, vip: str) -> bool:
    """Whether a frame is an echo reply from the VIP to the client."""
    if frame[12:14] == b"\x08\x00":
        pair = (IPv4Address(frame[26:30]), IPv4Address(frame[30:34]))
        return pair == (ip_address(vip), ip_address(client)) and frame[34:35] == b"\0"
    if frame[12:14] != b"\x86\xdd":
        return False
    pair6 = (IPv6Address(frame[22:38]), IPv6Address(frame[38:54]))
    return pair6 == (ip_address(vip), ip_address(client)) and frame[54:55] == b"\x81"


def reply_devices(field: Ground, client: str, vip: str) -> set[str]:
    """By which devices the node answers an echo request that comes in on our device; none if it does not."""
    sockets = {device: field.listen(device) for device in (OURS, OTHER)}
    found: set[str] = set()

    def look() -> bool:
        for device, raw in sockets.items():
            while True:
                try:
                    frame = raw.recv(2048)
                except BlockingIOError:
                    break
                if is_reply(frame, client, vip):
                    found.add(device)
        return bool(found)

    try:
        field.send(OURS, echo_request(client, vip))
        until(look, tries=40)
    finally:
        for raw in sockets.values():
            raw.close()
    return found


@pytest.mark.parametrize("everywhere", [0, 1, 2])
@pytest.mark.parametrize("device", [0, 1, 2])
def test_our_device_is_exempt_and_no_other(
    field: Ground, controller: Controller, everywhere: int, device: int
) -> None:
    rp_filter({"all": everywhere, "default": 2 - device, OURS: device, OTHER: device, QUIET: 0})
    backend = ("ebpf", "nft")[(everywhere + device) % 2]
    before = sysctls()
    strictness = max(everywhere, device)
    assert let_in(field) == PASSES[strictness]
    for client, vip in CLIENTS:
        assert OURS not in reply_devices(field, client, vip)

    controller.apply(parse_policy(POLICY.format(backend=backend).encode(), "policy.yaml"))
    assert effective(OURS) == 0
    assert let_in(field) == PASSES[strictness]
    assert effective(QUIET) == everywhere
    for client, vip in CLIENTS:
        assert reply_devices(field, client, vip) == {OURS}
    field.node.ip(["link add late0 type veth peer name late1"])
    assert effective("late0") == max(everywhere, 2 - device)
    field.node.ip(["link del late0"])

    controller.teardown()
    assert sysctls() == before
    assert let_in(field) == PASSES[strictness]


def test_the_check_of_an_unrelated_device_never_pauses(field: Ground, controller: Controller) -> None:
    """Spoofed packets all the time while policies come and go: not one gets in."""
    rp_filter({"all": 1, "default": 0, OURS: 0, OTHER: 0, QUIET: 0})
    nft, before, sent = Nft(), refused(), 0
    nft.seen()
    packet = numbered4(packets.ipv4(ASYMMETRIC, "172.31.1.1", packets.udp()), 77)
    frame, stop = packets.frame(packets.ETH_P_IP, packet), threading.Event()

    def spoof() -> None:
        nonlocal sent
        while not stop.wait(0.0005):
            field.send(OTHER, frame)
            sent += 1

    spoofer = threading.Thread(target=spoof)
    spoofer.start()
    try:
        for _ in range(3):
            controller.apply(parse_policy(POLICY.format(backend="nft").encode(), "policy.yaml"))
            controller.teardown()
    finally:
        stop.set()
        spoofer.join()
    assert sent > 100
    assert until(lambda: refused() - before >= sent)
    assert nft.seen() == {}
    assert refused() - before == sent
