# SPDX-License-Identifier: Apache-2.0
"""TCP and HTTP probes: the node itself connects, by its own routes or by one network.

By a network means bound to its device and with its mark. The mark sends the packets to the table of the network, and so
to its gateway, as replies go; bound only to the device, they would follow the main table. The device keeps them
there where no rule knows the mark: nothing may look reachable because another way leads there.
"""

from __future__ import annotations

import re
import socket
import time

from datapath.plan.probe import ProbeTask

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})\b")
#: A status line is short; who sends more before its end speaks something else.
_STATUS_LINE_MAX = 1024
_GOOD = range(200, 400)


def connect(task: ProbeTask, deadline_s: float) -> str:
    """Connect and close.

    Raises:
        OSError: what the kernel says; TimeoutError is one.
    """
    _connected(task, deadline_s).close()
    return ""


def get(task: ProbeTask, deadline_s: float) -> str:
    """GET, and read the status.

    Not by `http.client`: its timeout is for each read, so a server that answers byte by byte could hold an apply.

    Returns:
        the status or what came instead, where that is not 2xx or 3xx.
    """
    request = (
        f"GET {task.path} HTTP/1.1\r\nHost: {task.host}\r\nUser-Agent: datapath-probe\r\n"
        "Accept: */*\r\nConnection: close\r\n\r\n"
    )
    with _connected(task, deadline_s) as sock:
        sock.settimeout(_left(deadline_s))
        sock.sendall(request.encode("ascii"))
        answer = b""
        while b"\n" not in answer and len(answer) < _STATUS_LINE_MAX:
            sock.settimeout(_left(deadline_s))
            part = sock.recv(_STATUS_LINE_MAX)
            if not part:
                break
            answer += part
    match = _STATUS.match(answer)
    if match is None:
        return (
            "connected, but what answers is not HTTP" if answer else "connected, but closed without an answer"
        )
    return "" if int(match[1]) in _GOOD else f"status {int(match[1])}"


def _connected(task: ProbeTask, deadline_s: float) -> socket.socket:
    is_six = task.address.version == 6
    sock = socket.socket(socket.AF_INET6 if is_six else socket.AF_INET, socket.SOCK_STREAM)
    try:
        scope = 0
        if task.device:
            scope = socket.if_nametoindex(task.device)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, task.device.encode() + b"\0")
        if task.fwmark:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, task.fwmark)
        sock.settimeout(_left(deadline_s))
        where = (str(task.address), task.port)
        sock.connect((*where, 0, scope if task.address.is_link_local else 0) if is_six else where)
    except BaseException:
        sock.close()
        raise
    return sock


def _left(deadline_s: float) -> float:
    left = deadline_s - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
