# SPDX-License-Identifier: Apache-2.0
"""One entry of `probes`."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, WithJsonSchema, model_validator

from datapath.policy.addresses import RefusedError
from datapath.policy.base import PolicyModel
from datapath.policy.fields import Integer, Name
from datapath.policy.targets import Endpoint, Url, parse_endpoint, parse_url

#: Probes run side by side, before and after a change; the daemon's watchdog must not wait for longer.
PROBE_SECONDS_MAX = 10
PROBES_MAX = 32

_KINDS = ("gateway", "tcp", "http")

EndpointField = Annotated[
    Endpoint,
    PlainValidator(parse_endpoint),
    PlainSerializer(str),
    WithJsonSchema(
        {"type": "string", "description": "address:port", "pattern": r"^(\[.+\]|[^:\[\]]+):[0-9]{1,5}$"}
    ),
]
UrlField = Annotated[
    Url,
    PlainValidator(parse_url),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "description": "http URL", "pattern": "^http://"}),
]


class Probe(PolicyModel):
    """What must work after a change, or the change is undone: exactly one of `gateway`, `tcp` and `http`."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": [kind]} for kind in _KINDS]})

    gateway: Name | None = Field(
        default=None,
        description="Name of a network: each of its gateways answers on the network's device (ARP, or neighbour "
        "discovery for IPv6).",
    )
    tcp: EndpointField | None = Field(
        default=None,
        description="A TCP connection to this `address:port` is accepted; an IPv6 address is in brackets.",
    )
    http: UrlField | None = Field(
        default=None,
        description="A GET of this `http://` URL is answered with a status of 200 to 399. "
        "Its host is an address. No https: probe its port with `tcp`.",
    )
    network: Name | None = Field(
        default=None,
        description="For `tcp` and `http`: connect by this network, by its device and with its mark, and so by its "
        "gateway. Default: as the node's own routes lead.",
    )
    timeout: Integer = Field(default=2, ge=1, le=PROBE_SECONDS_MAX, description="Seconds for one attempt.")
    attempts: Integer = Field(
        default=3,
        ge=1,
        le=PROBE_SECONDS_MAX,
        description="How often it is tried, one `timeout` apart, until it works. "
        f"All attempts together take at most {PROBE_SECONDS_MAX} seconds.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Probe:
        given = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if not given:
            raise RefusedError("the probe tries nothing", "add one of `gateway`, `tcp` and `http`")
        if len(given) > 1:
            raise RefusedError(
                f"the probe has {' and '.join(f'`{kind}`' for kind in given)}", "make a probe of each"
            )
        if self.gateway is not None and self.network is not None:
            raise RefusedError("`gateway` names the network already", "remove `network`")
        if self.timeout * self.attempts > PROBE_SECONDS_MAX:
            raise RefusedError(
                f"{self.attempts} attempts of {self.timeout} s take {self.attempts * self.timeout} s",
                f"all attempts together may take {PROBE_SECONDS_MAX} s",
            )
        return self

    @property
    def endpoint(self) -> Endpoint | None:
        """What a connection is made to; None for a gateway."""
        return self.http.endpoint if self.http is not None else self.tcp

    @property
    def network_name(self) -> str | None:
        """The network that it is about, if it is about one."""
        return self.gateway or self.network
