# SPDX-License-Identifier: Apache-2.0
"""Traffic that is more than one small packet each way: transfers and fragments."""

from __future__ import annotations

import os
import zlib

import pytest

from tools.lab import VIP_BACKENDS, Backend, Lab
from tools.lab.servers import pattern_crc
from tools.lab.traffic import connect, datagrams, download, upload

pytestmark = [pytest.mark.root, pytest.mark.bpf]

SIZE = 4 << 20
CLIENTS = ("client", "client_vlan", "client_overlap")


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("backend", VIP_BACKENDS, ids=str)
@pytest.mark.parametrize("client", CLIENTS)
def test_large_transfer_both_ways(served: Lab, client: str, backend: Backend, family: int) -> None:
    served.by_gateway.reset()
    with connect(served, client, served.networks[0].vips[backend].get(family)) as sock:
        assert download(sock, SIZE) == pattern_crc(SIZE)
        assert upload(sock, SIZE) == pattern_crc(SIZE)
    assert served.by_gateway.wrong_way() == 0


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("backend", VIP_BACKENDS, ids=str)
@pytest.mark.parametrize("client", CLIENTS)
def test_fragmented_datagrams_both_ways(served: Lab, client: str, backend: Backend, family: int) -> None:
    served.by_gateway.reset()
    target = served.networks[0].vips[backend].get(family)
    with datagrams(served, client, target, seconds=2) as sock:
        for size in (1473, 4000, 30000):
            payload = os.urandom(size)
            sock.send(payload)
            assert zlib.crc32(sock.recv(65536)) == zlib.crc32(payload)
    assert served.by_gateway.wrong_way() == 0
