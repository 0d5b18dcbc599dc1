# SPDX-License-Identifier: Apache-2.0
"""Answers ARP and neighbour solicitations for addresses that their device does not have, as MetalLB does.

MetalLB's speaker answers from user space on a packet socket: the kernel does not know the VIPs, and its
`arp_ignore`, `rp_filter` and routes have no say. Static neighbour entries would hide every fault of the
device, and the kernel's proxy ARP asks the routing table (and `rp_filter`) first, so neither is like it.
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from collections.abc import Iterable

from tools.lab.netns import Namespace
from tools.lab.topology import IpAddress

_ETH_P_ARP = 0x0806
_ETH_P_IPV6 = 0x86DD
_SOL_PACKET, _ADD_MEMBERSHIP, _MR_ALLMULTI = 263, 1, 2
_SO_ATTACH_FILTER = 26
_NS, _NA = 135, 136


def _attach_ns_filter(sock: socket.socket) -> None:
    """Let only neighbour solicitations through: Python must not see every IPv6 packet of a transfer."""
    code = [
        (0x30, 0, 0, 20),
        (0x15, 0, 3, 58),
        (0x30, 0, 0, 54),
        (0x15, 0, 1, _NS),
        (0x06, 0, 0, 0xFFFF),
        (0x06, 0, 0, 0),
    ]
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(program)
    sock.setsockopt(
        socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(code), ctypes.addressof(buffer))
    )


class Announcer:
    """Answers for some addresses on one device.

    Attributes:
        sockets: to be polled; `answer` takes a readable one.
    """

    def __init__(self, namespace: Namespace, device: str, addresses: Iterable[IpAddress]) -> None:
        self._mac = b""
        self._addresses = frozenset(a.packed for a in addresses)

        def listen() -> tuple[socket.socket, socket.socket]:
            arp = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ARP))
            arp.bind((device, _ETH_P_ARP))
            ndp = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            _attach_ns_filter(ndp)
            ndp.bind((device, _ETH_P_IPV6))
            # MetalLB joins each VIP's solicited-node group; all-multicast is the same without one call per VIP.
            ndp.setsockopt(
                _SOL_PACKET,
                _ADD_MEMBERSHIP,
                struct.pack("iHH8s", socket.if_nametoindex(device), _MR_ALLMULTI, 0, b""),
            )
            self._mac = arp.getsockname()[4]
            return arp, ndp

        self.sockets = namespace.call(listen)
        for sock in self.sockets:
            sock.setblocking(False)

    def answer(self, sock: socket.socket) -> None:
        """Read one request and answer it if it asks for one of ours."""
        try:
            frame = sock.recv(256)
            reply = self._arp(frame) if sock is self.sockets[0] else self._ndp(frame)
            if reply:
                sock.send(reply)
        except OSError as error:
            # The device may be down or gone for a while: so is MetalLB's answer then.
            if error.errno not in (errno.EAGAIN, errno.ENETDOWN, errno.ENXIO, errno.ENODEV):
                raise

    def _arp(self, frame: bytes) -> bytes | None:
        if len(frame) < 42 or frame[20:22] != b"\0\1" or frame[38:42] not in self._addresses:
            return None
        sender_mac, sender, target = frame[22:28], frame[28:32], frame[38:42]
        return (
            sender_mac
            + self._mac
            + struct.pack("!HHHBBH", _ETH_P_ARP, 1, 0x0800, 6, 4, 2)
            + self._mac
            + target
            + sender_mac
            + sender
        )

    def _ndp(self, frame: bytes) -> bytes | None:
        target, source = frame[62:78], frame[22:38]
        if target not in self._addresses or source == bytes(16):
            return None
        body = struct.pack("!BBHI", _NA, 0, 0, 0x60000000) + target + b"\x02\x01" + self._mac
        body = body[:2] + _checksum(target + source + struct.pack("!II", len(body), 58) + body) + body[4:]
        header = struct.pack("!IHBB", 0x60000000, len(body), 58, 255) + target + source
        return frame[6:12] + self._mac + struct.pack("!H", _ETH_P_IPV6) + header + body

    def close(self) -> None:
        """Stop answering."""
        for sock in self.sockets:
            sock.close()


def _checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF)
