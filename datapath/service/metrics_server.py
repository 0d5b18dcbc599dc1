# SPDX-License-Identifier: Apache-2.0
"""The metrics endpoint: plain HTTP on loopback or a unix socket, one request at a time, in one thread."""

from __future__ import annotations

import ipaddress
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from socketserver import BaseServer, UnixStreamServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from datapath.errors import DatapathError, InputError
from datapath.observe.metrics import ServiceCollector
from datapath.observe.stats import ServiceStats

_UNIX = "unix:"
#: A client that says nothing must not keep others out for longer.
_CLIENT_TIMEOUT_S = 5
_SOCKET_MODE = 0o660


class _UnixServer(UnixStreamServer):
    """HTTP handlers want a client address of two parts, which a unix socket has not."""

    def get_request(self) -> tuple[Any, Any]:
        connection, _ = super().get_request()
        return connection, ("unix", 0)


def start_metrics(where: str, stats: ServiceStats) -> BaseServer:
    """Serve `/metrics`.

    Args:
        where: `ADDRESS:PORT` of loopback, or `unix:PATH`.
        stats: what to tell.

    Raises:
        InputError: neither of these.
        DatapathError: it cannot be bound.
    """
    registry = CollectorRegistry()
    registry.register(ServiceCollector(stats))

    class Handler(BaseHTTPRequestHandler):
        timeout = _CLIENT_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            body = generate_latest(registry)
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (http.server's name, too)
            """Every scrape would be a line in the journal."""

    try:
        server = _bind(where, Handler)
    except OSError as error:
        raise DatapathError(f"metrics on {where}: {error.strerror or error}", hint="is it taken?") from error
    threading.Thread(target=server.serve_forever, args=(1.0,), name="metrics", daemon=True).start()
    return server


def _bind(where: str, handler: type[BaseHTTPRequestHandler]) -> BaseServer:
    if where.startswith(_UNIX):
        path = Path(where.removeprefix(_UNIX))
        # A socket of an earlier process; the daemon's lock says that it is gone.
        if path.is_socket():
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        server: BaseServer = _UnixServer(str(path), handler)
        path.chmod(_SOCKET_MODE)
        return server
    host, _, port = where.rpartition(":")
    try:
        address = ipaddress.ip_address(host.strip("[]"))
        number = int(port)
    except ValueError as error:
        raise InputError(f"--metrics {where}: give ADDRESS:PORT or unix:PATH") from error
    if not address.is_loopback:
        raise InputError(
            f"--metrics {where}: not a loopback address",
            hint="use 127.0.0.1:PORT or unix:PATH, and a proxy that asks for a password",
        )
    if address.version == 6:
        return _HttpServer6((str(address), number), handler)
    return HTTPServer((str(address), number), handler)


class _HttpServer6(HTTPServer):
    address_family = 10  # AF_INET6; the module of that name is for kernel/ only
