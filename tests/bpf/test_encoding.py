# SPDX-License-Identifier: Apache-2.0
"""What is written into the maps is read back exactly, or drift would be missed."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from datapath.errors import KernelError
from datapath.kernel.bpf import abi, resolve
from datapath.kernel.bpf.encoding import decode_networks, encode_networks
from datapath.kernel.bpf.tables import PrefixTable
from datapath.plan.ingress import IngressNetwork, IngressPoint, IngressProgram, SourceAction, VipCheck


def _program(*vips: str, check: VipCheck = VipCheck.FEASIBLE) -> IngressProgram:
    prefixes = tuple(map(ip_network, vips))
    network = IngressNetwork("a", 1, 0, IngressPoint("eth0"), "eth0", vips=prefixes, vip_check=check)
    return IngressProgram(0xFF, (network,))


@pytest.mark.parametrize(
    ("vips", "kept"),
    [
        ((), ()),
        (("192.0.2.0/24",), ()),
        (("2001:db8::/48", "192.0.2.0/24"), ()),
        (("0.0.0.0/0", "::/0"), ()),
        (("255.255.255.255/32", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128"), ()),
        (("192.0.2.7/32", "192.0.2.0/25", "2001:db8::/48"), ("192.0.2.0/25",)),
        (("2001:db8:1::/48", "2001:db8::/48", "2001:db8:2::/48"), ("2001:db8::/48", "2001:db8:2::/48")),
    ],
)
def test_the_first_vip_lies_with_the_network(vips: tuple[str, ...], kept: tuple[str, ...]) -> None:
    tables = resolve(_program(*vips), {"eth0": 7})
    assert decode_networks(encode_networks(tables.networks)) == tables.networks
    assert tables.prefixes[PrefixTable.VIPS] == {
        (1, ip_network(prefix)): SourceAction.ALLOW for prefix in kept
    }


def test_unasked_vips_are_nowhere() -> None:
    tables = resolve(_program("192.0.2.0/24", "198.51.100.0/24", check=VipCheck.OFF), {"eth0": 7})
    (entry,) = tables.networks.values()
    assert (entry.first_vip4, entry.more_vips, tables.prefixes[PrefixTable.VIPS]) == (None, frozenset(), {})


@pytest.mark.parametrize("mask", ["ff00ff00", "000000ff", "ffff0000", "00000000"])
def test_what_is_no_prefix_is_no_network_of_ours(mask: str) -> None:
    # The other entry is the guard.
    (key, raw), _ = encode_networks(resolve(_program("192.0.2.0/24"), {"eth0": 7}).networks).items()
    value = abi.Network.from_buffer_copy(raw)
    value.vip4_mask[:] = list(bytes.fromhex(mask))
    with pytest.raises(KernelError, match="is no prefix"):
        decode_networks({key: bytes(value)})
