# SPDX-License-Identifier: Apache-2.0
"""Devices one by one, as who asks about a few of them needs it; `rtnl_dump` reads them by the thousand."""

from __future__ import annotations

import socket
import struct
from typing import Final

#: RTM_GETLINK, and struct ifinfomsg: family, type, index, flags, changed flags.
GETLINK: Final = 18
IFINFOMSG: Final = struct.Struct("=BxHiII")


def device_name(ifindex: int) -> str:
    """The name, or the number of a device that is gone."""
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return str(ifindex)
