# SPDX-License-Identifier: Apache-2.0
"""Compiles and loads one program with bcc, hands its file descriptors over and ends.

A process of its own because bcc and LLVM cost more than 100 MB that a daemon would keep. Run as a script, so
that it imports nothing but bcc and the standard library: ``compile_child.py SOCKET_FD``, the request as JSON
on standard input, compiler and verifier messages on standard error. The exit status says how far it came
(`STATUS_*`); the file descriptors go over the socket in the order of the request.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys
from typing import Any

STATUS_NO_BCC = 10
STATUS_COMPILE = 11
STATUS_LOAD = 12


def _export(module: Any, request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The instructions as loaded, and the descriptors in them by map."""
    from bcc.libbcc import lib  # noqa: PLC0415 - as bcc itself

    # bcc declares no types for this one, and a pointer would be cut to 32 bits.
    lib.bpf_table_name.restype = ctypes.c_char_p
    lib.bpf_table_name.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    names = [lib.bpf_table_name(module.module, index) for index in range(lib.bpf_num_tables(module.module))]
    return {
        "functions": {name: module.dump_func(name).hex() for name in request["functions"]},
        "maps": {name.decode(): lib.bpf_table_fd(module.module, name) for name in names},
    }


def main() -> int:
    """Serve the one request."""
    request = json.load(sys.stdin)
    os.environ["BCC_KERNEL_SOURCE"] = request["kernel_source"]
    try:
        from bcc import BPF  # noqa: PLC0415 - bcc reads BCC_KERNEL_SOURCE when it is imported
    except (ImportError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return STATUS_NO_BCC
    try:
        module = BPF(text=request["text"], cflags=request["cflags"])
    except Exception as error:  # noqa: BLE001 - bcc raises plain Exception
        sys.stderr.write(f"{error}\n")
        return STATUS_COMPILE
    try:
        programs = [module.load_func(name, BPF.SCHED_CLS).fd for name in request["functions"]]
        maps = [module[name].map_fd for name in request["maps"]]
    except Exception as error:  # noqa: BLE001 - bcc raises plain Exception
        sys.stderr.write(f"{error}\n")
        return STATUS_LOAD
    if request["export"]:
        json.dump(_export(module, request), sys.stdout)
    with socket.socket(fileno=int(sys.argv[1])) as channel:
        socket.send_fds(channel, [b"ok"], programs + maps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
