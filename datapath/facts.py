# SPDX-License-Identifier: Apache-2.0
"""What the compiler may know of a host: from the live kernel, or from a file for review elsewhere.

`datapath facts` prints this; `datapath compile POLICY --facts FILE` reads it back.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import Annotated, Final

import pydantic
import pydantic.dataclasses
import yaml

from datapath.errors import InputError

IpInterface = IPv4Interface | IPv6Interface
IpNetwork = IPv4Network | IPv6Network
#: Kinds of devices whose packets leave by another one without a tag: they show up once more at its egress. (The
#: other end of a veth is no such device.)
STACKED_KINDS: Final = frozenset({"macvlan", "macvtap", "ipvlan", "ipvtap"})
_FORBID: Final = pydantic.ConfigDict(extra="forbid")


# Of what there are thousands no models: each of those has a dictionary and a set besides, ten times the memory.
@pydantic.dataclasses.dataclass(frozen=True, slots=True, config=_FORBID)
class LinkFacts:
    """One network device.

    Attributes:
        kind: IFLA_INFO_KIND, for example `vlan`; empty for a physical device.
        parent: the lower device of a VLAN or of one of `STACKED_KINDS`; empty where there is none.
        addresses: with their prefix lengths, link-local ones included.
        mtu: 0 where it is not known.
        vrf: that it belongs to; empty where it is in none.
        vrf_table: of a VRF itself.
    """

    name: str
    kind: str = ""
    parent: str = ""
    vlan_id: int = 0
    vlan_protocol: int = 0
    up: bool = True
    mtu: int = 0
    addresses: tuple[IpInterface, ...] = ()
    vrf: str = ""
    vrf_table: int = 0


@pydantic.dataclasses.dataclass(frozen=True, slots=True, config=_FORBID)
class IdFacts:
    """Ids that a network has in the kernel already."""

    name: str
    fwmark: Annotated[int, pydantic.Field(ge=0, le=0xFFFFFFFF)] = 0
    table: Annotated[int, pydantic.Field(ge=0, le=0xFFFFFFFF)] = 0
    slot: Annotated[int, pydantic.Field(ge=0, le=0xFFFF)] = 0
    zone: Annotated[int, pydantic.Field(ge=0, le=0xFFFF)] = 0


class Facts(pydantic.BaseModel):
    """One host.

    Attributes:
        links: every device, by name.
        ids: read back from our own objects; the mask they were made under is `fwmark_mask`.
        previous_ids: as they were when the last change was finished; connections carry marks of these. They differ
            from `ids` only after a change that did not end.
        previous_mask: the mask of those.
        marked_by_nft: our live table has the chains that mark and check packets (`backend: nft`).
        rule_bank: which of the two banks of ip rules is live, None where there is none.
        has_rule_tree: it holds a tree; not up to three leaves, nor a tree of an earlier version.
        ebpf_refused: why this host cannot load the eBPF program; empty where it can, or nobody asked.
        default_devices: that main's default routes leave by, by family; only looked at for
            `steering: direct` and `accelerate`.
        taken_zones: connection-tracking zones that others use, with who does; only looked at for `isolate_clients`.
        flowtables: of others: family, table and name.
        flowtables_refused: why this kernel takes none; empty where it does, or nobody asked (`accelerate`).
        live_zones: where connections of our networks are, by name, if not where `ids` say: on the way back from a
            change that moved them.
        stale_early_demux: the kernel hands a packet to the socket that it found before NAT changed its port.
        gateways_down: that do not answer, by network, as the daemon found out; only among several (`gateways`).
        egress_sets: what external programs put into the sets of `egress`, by entry (`datapath egress set`).
        forwarding: `net.ipv4.ip_forward` and `net.ipv6.conf.all.forwarding`.
        ipv6: this kernel has IPv6 (`ipv6.disable=1` takes it away).
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    links: tuple[LinkFacts, ...] = ()
    ids: tuple[IdFacts, ...] = ()
    fwmark_mask: int = 0
    previous_ids: tuple[IdFacts, ...] = ()
    previous_mask: int = 0
    marked_by_nft: bool = False
    rule_bank: int | None = None
    has_rule_tree: bool = False
    ebpf_refused: str = ""
    default_devices: dict[int, tuple[str, ...]] = {}
    taken_zones: dict[int, str] = {}
    flowtables: tuple[str, ...] = ()
    flowtables_refused: str = ""
    live_zones: dict[str, int] = {}
    stale_early_demux: bool = False
    gateways_down: dict[str, tuple[IPv4Address | IPv6Address, ...]] = {}
    forwarding: dict[int, bool] = {4: True, 6: True}
    ipv6: bool = True
    egress_sets: dict[str, tuple[IpNetwork, ...]] = {}

    def has_family(self, family: int) -> bool:
        """Whether this kernel takes routes of that IP version."""
        return family == 4 or self.ipv6

    def dump(self) -> str:
        """YAML that `load_facts` reads back to an equal value."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def load_facts(path: Path) -> Facts:
    """Read facts from a YAML file.

    Raises:
        InputError: the file cannot be read, is no YAML, or has unknown or wrong fields.
    """
    try:
        document = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}", hint="make one with `datapath facts`") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    try:
        return Facts.model_validate(document or {})
    except pydantic.ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        raise InputError("\n".join(lines), hint="compare with the output of `datapath facts`") from error
