# SPDX-License-Identifier: Apache-2.0
"""What a probe connects to, as it is written in a policy: `address:port` and `http://address/path`.

Addresses, not names: a name would make an apply wait for a resolver, and undo it because of DNS.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from datapath.policy.addresses import IpAddress, RefusedError, kind, shown
from datapath.policy.fields import check_port

_HTTP_PORT = 80
_URL_CHARACTERS_MAX = 500
_ENDPOINT = re.compile(r"(?:\[(?P<six>[^]]*)\]|(?P<four>[^:\[\]]*)):(?P<port>[0-9]{1,5})")
#: RFC 3986: what a path and a query may hold; everything else is percent-encoded.
_PATH = re.compile(r"[A-Za-z0-9._~!$&'()*+,;=:@%/?-]*")
_EXAMPLE = "write `192.0.2.5:443`, or `'[2001:db8::5]:443'` in quotes"
_URL_EXAMPLE = "write it like http://192.0.2.5:8080/healthz"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TCP port of one address."""

    address: IpAddress
    port: int

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.address.version == 6 else f"{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class Url:
    """An http URL.

    Attributes:
        text: as it was written.
        host: as the Host header names it.
        path: with the query; never empty.
    """

    text: str
    endpoint: Endpoint
    host: str
    path: str

    def __str__(self) -> str:
        return self.text


def parse_endpoint(value: object) -> Endpoint:
    """Read `address:port`; IPv6 addresses are in brackets.

    Raises:
        RefusedError: it is something else.
    """
    if isinstance(value, Endpoint):
        return value
    if not isinstance(value, str):
        raise RefusedError(f"expected an address and a port, not {kind(value)}", _EXAMPLE)
    match = _ENDPOINT.fullmatch(value.strip())
    if match is None:
        raise RefusedError(f"{shown(value)} is not an address and a port", _EXAMPLE)
    return Endpoint(
        _host_address(match["six"] or match["four"] or "", value, _EXAMPLE), check_port(int(match["port"]))
    )


def parse_url(value: object) -> Url:
    """Read an http URL whose host is an address.

    Raises:
        RefusedError: it is something else.
    """
    if isinstance(value, Url):
        return value
    if not isinstance(value, str):
        raise RefusedError(f"expected a URL, not {kind(value)}", _URL_EXAMPLE)
    text = value.strip()
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise RefusedError(f"{shown(value)} is not a URL", _URL_EXAMPLE) from None
    if parts.scheme == "https":
        raise RefusedError(
            "https is not probed: whether a certificate is good says nothing about the network",
            "probe its port with `tcp`, or an http URL",
        )
    if parts.scheme != "http" or not host or parts.username is not None or parts.fragment:
        raise RefusedError(f"{shown(value)} is not an http URL", _URL_EXAMPLE)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    # `urlsplit` drops line breaks, and with them what it would have had to refuse.
    if not _PATH.fullmatch(path) or not text.isprintable() or len(text) > _URL_CHARACTERS_MAX:
        raise RefusedError(
            f"{shown(value)} cannot be sent as it is",
            f"percent-encode it, and use at most {_URL_CHARACTERS_MAX} characters",
        )
    endpoint = Endpoint(
        _host_address(host, value, _URL_EXAMPLE), _HTTP_PORT if port is None else check_port(port)
    )
    return Url(text, endpoint, parts.netloc, path)


def _host_address(host: str, value: object, example: str) -> IpAddress:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise RefusedError(
            f"{shown(value)} does not name its host by address",
            f"{example}: a name would make every change depend on DNS",
        ) from None
    if address.is_multicast or address.is_unspecified or (address.version == 6 and address.scope_id):
        raise RefusedError(f"nothing can be connected to at {address}", example)
    return address
