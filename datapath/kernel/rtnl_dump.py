# SPDX-License-Identifier: Apache-2.0
"""Dumps of links, addresses, rules and routes straight from rtnetlink, as plain dictionaries.

The keys are pyroute2's, so `kernel/rtnl.py` reads either. Its generic decoder takes half a millisecond a message:
with 100 networks that is a second for every look at the kernel, and a daemon looks often.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from datapath.errors import KernelError
from datapath.kernel.netlink import Netlink, attributes

_GETLINK, _GETADDR, _GETROUTE, _GETRULE = 18, 22, 26, 34
#: Without statistics a device is a quarter of the size.
_IFLA_EXT_MASK, _SKIP_STATS = 29, 1 << 3
_RTA_TABLE: Final = 15
_Decode = Callable[[bytes], Any]
_Schema = Mapping[int, tuple[str, _Decode]]


def _u32(value: bytes) -> int:
    return int(struct.unpack_from("=I", value)[0])


def _u16(value: bytes) -> int:
    return int(struct.unpack_from("=H", value)[0])


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode(errors="replace")


def _address(value: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(value) == 4 else socket.AF_INET6, value)


def _nested(schema: _Schema) -> _Decode:
    return lambda value: dict(_attributes(value, 0, schema))


_LINK: Final[_Schema] = {
    3: ("IFLA_IFNAME", _text),
    5: ("IFLA_LINK", _u32),
    10: ("IFLA_MASTER", _u32),
    18: (
        "IFLA_LINKINFO",
        _nested(
            {
                1: ("IFLA_INFO_KIND", _text),
                2: ("IFLA_INFO_DATA", bytes),
                4: ("IFLA_INFO_SLAVE_KIND", _text),
            }
        ),
    ),
}
#: Each kind numbers its data in its own way.
_LINK_DATA: Final[Mapping[str, _Schema]] = {
    "vlan": {1: ("IFLA_VLAN_ID", _u16), 5: ("IFLA_VLAN_PROTOCOL", _u16)},
    "vrf": {1: ("IFLA_VRF_TABLE", _u32)},
}
_ADDRESS: Final[_Schema] = {1: ("IFA_ADDRESS", _address), 2: ("IFA_LOCAL", _address)}
_ROUTE: Final[_Schema] = {
    1: ("RTA_DST", _address),
    4: ("RTA_OIF", _u32),
    5: ("RTA_GATEWAY", _address),
    6: ("RTA_PRIORITY", _u32),
    15: ("RTA_TABLE", _u32),
}
_RULE: Final[_Schema] = {
    1: ("FRA_DST", _address),
    2: ("FRA_SRC", _address),
    4: ("FRA_GOTO", _u32),
    6: ("FRA_PRIORITY", _u32),
    10: ("FRA_FWMARK", _u32),
    15: ("FRA_TABLE", _u32),
    16: ("FRA_FWMASK", _u32),
    21: ("FRA_PROTOCOL", lambda value: value[0]),
}


class RtnlDump:
    """One rtnetlink socket for dumps."""

    def __init__(self) -> None:
        self._netlink = Netlink()

    def close(self) -> None:
        self._netlink.close()

    def get_links(self) -> Iterator[dict[str, Any]]:
        """All devices: `index`, `flags` and the attributes of `_LINK`."""
        extended = struct.pack("=HHI", 8, _IFLA_EXT_MASK, _SKIP_STATS)
        for body in self._netlink.dump("links", _GETLINK, bytes(16) + extended):
            _, _, index, flags = struct.unpack_from("=BxHiI", body)
            link = {"index": index, "flags": flags, **dict(_attributes(body, 16, _LINK))}
            info = link.get("IFLA_LINKINFO", {})
            schema = _LINK_DATA.get(info.get("IFLA_INFO_KIND", ""), {})
            info["IFLA_INFO_DATA"] = dict(_attributes(info.get("IFLA_INFO_DATA", b""), 0, schema))
            yield link

    def get_addr(self) -> Iterator[dict[str, Any]]:
        """All addresses: `family`, `prefixlen`, `index` and the attributes of `_ADDRESS`."""
        for body in self._netlink.dump("addresses", _GETADDR, bytes(8)):
            family, length, index = struct.unpack_from("=BBxxI", body)
            fixed = {"family": family, "prefixlen": length, "index": index}
            yield {**fixed, **dict(_attributes(body, 8, _ADDRESS))}

    def get_rules(self, family: int) -> Iterator[dict[str, Any]]:
        """All rules of a family: `dst_len`, `src_len`, `table`, `action` and the attributes of `_RULE`."""
        for body in self._netlink.dump("rules", _GETRULE, struct.pack("=B11x", family)):
            _, to_length, from_length, _, table, action = struct.unpack_from("=BBBBBxxB", body)
            fixed = {"dst_len": to_length, "src_len": from_length, "table": table, "action": action}
            yield {**fixed, **dict(_attributes(body, 12, _RULE))}

    def get_routes(self, family: int, proto: int = 0, table: int = 0) -> Iterator[dict[str, Any]]:
        """Routes of a family, those of one protocol or of one table, if asked."""
        request = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, proto, 0, 0, 0)
        if table:
            request += struct.pack("=HHI", 8, _RTA_TABLE, table)
        try:
            bodies = self._netlink.dump("routes", _GETROUTE, request)
        except KernelError as error:
            # A table that does not exist is an empty one.
            if error.errno != errno.ENOENT:
                raise
            return
        for body in bodies:
            family_, length, _, _, small, protocol, _, kind = struct.unpack_from("=8B", body)
            fixed = {"family": family_, "dst_len": length, "table": small, "proto": protocol, "type": kind}
            yield {**fixed, **dict(_attributes(body, 12, _ROUTE))}


def _attributes(body: bytes, offset: int, schema: _Schema) -> Iterator[tuple[str, Any]]:
    for kind, value in attributes(body, offset):
        known = schema.get(kind)
        if known is not None:
            yield known[0], known[1](value)
