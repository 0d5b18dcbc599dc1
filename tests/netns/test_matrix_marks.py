# SPDX-License-Identifier: Apache-2.0
"""Mark bits outside our mask belong to others: they arrive as they were set, in the packet and in the connection."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tools.lab import Backend, Lab, command
from tools.lab.traffic import datagrams

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.root, pytest.mark.bpf]

#: kube-proxy's own bits have a meaning in this lab.
KUBE_PROXY = 0xC000
ALL = 0xFFFFFFFF
BACKENDS = (Backend.LOCAL_POD, Backend.REMOTE_POD, Backend.HOST_VIP)


def others(mask: int, packet: int, conn: int) -> str:
    """Somebody who sets mark bits of his own before our chains, and looks at all of them after everyone else."""
    return f"""
add table inet other
delete table inet other
table inet other {{
  set seen {{ type mark . mark; flags dynamic; size 1024; }}
  chain raw {{
    type filter hook prerouting priority -300;
    meta mark set meta mark & {mask:#x} | {packet:#x}
  }}
  chain conn {{
    type filter hook prerouting priority -145;
    ct direction original ct mark set ct mark & {mask:#x} | {conn:#x}
  }}
  chain local {{
    type filter hook output priority -145;
    meta mark set meta mark & {mask:#x} | {packet:#x}
  }}
  chain last {{
    type filter hook postrouting priority 400;
    meta l4proto udp update @seen {{ meta mark . ct mark }}
  }}
  chain local_in {{
    type filter hook input priority 400;
    meta l4proto udp update @seen {{ meta mark . ct mark }}
  }}
}}
"""


def seen(lab: Lab) -> set[tuple[int, int]]:
    listing = json.loads(lab.node.run("nft", "-j", "list", "set", "inet", "other", "seen"))
    elements = [e for item in listing["nftables"] for e in item.get("set", {}).get("elem", ())]
    return {(e["concat"][0], e["concat"][1]) for e in elements}


@pytest.fixture(
    scope="module",
    params=[(0x0FFF0000, 0x0FE50000), (0x00FF0000, 0x00010000), (0x10010300, 0x10000200)],
    ids=["many bits", "one bit", "mask with gaps"],
)
def marked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Lab, int, int]]:
    """A lab whose policy may use one mask, and its network's mark."""
    state: Path = tmp_path_factory.mktemp("state")
    mask, mark = request.param
    with Lab() as lab:
        policy = lab.policy(extra=f"marks:\n  mask: {mask:#x}\n", network_extra=f"    mark: {mark:#x}\n")
        command.apply(lab, state, policy)
        yield lab, mask, mark


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(packet=st.integers(0, ALL), conn=st.integers(0, ALL))
def test_bits_of_others_are_preserved_and_ours_do_their_work(
    marked: tuple[Lab, int, int], packet: int, conn: int
) -> None:
    lab, mask, mark = marked
    packet, conn = packet & ~mask & ~KUBE_PROXY & ALL, conn & ~mask & ALL
    lab.node.nft(others(mask, packet, conn))
    lab.by_gateway.reset()
    for version in (4, 6):
        for backend in BACKENDS:
            with datagrams(lab, "client", lab.networks[0].vips[backend].get(version)) as sock:
                sock.send(b"marks")
                assert sock.recv(100) == b"marks"

    marks = seen(lab)
    assert {p & ~mask & ALL for p, _ in marks} == {packet}
    assert {c & ~mask & ALL for _, c in marks} == {conn}
    assert {c & mask for _, c in marks} == {mark}
    assert {p & mask for p, _ in marks} == {0, mark}
    assert lab.by_gateway.wrong_way() == 0
