# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.policy import PROFILES, MarkProfile, capacity, deposit, extract
from datapath.policy.fields import check_mask

MASKS = st.integers(min_value=1, max_value=0xFFFF_FFFF)


@given(mask=MASKS, data=st.data())
def test_extract_inverts_deposit(mask: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(min_value=0, max_value=capacity(mask)))
    mark = deposit(index, mask)
    assert mark & ~mask == 0
    assert extract(mark, mask) == index


@given(mask=MASKS, mark=st.integers(min_value=0, max_value=0xFFFF_FFFF))
def test_deposit_inverts_extract_inside_the_mask(mask: int, mark: int) -> None:
    assert deposit(extract(mark, mask), mask) == mark & mask


@given(mask=MASKS, data=st.data())
def test_deposit_keeps_the_order(mask: int, data: st.DataObject) -> None:
    indexes = st.integers(min_value=0, max_value=capacity(mask))
    one, two = data.draw(indexes), data.draw(indexes)
    assert (one < two) == (deposit(one, mask) < deposit(two, mask))


def test_deposit_known_values() -> None:
    assert deposit(0b101, 0x0FFF_0000) == 0x0005_0000
    assert deposit(0b111, 0x8000_0101) == 0x8000_0101
    assert extract(0xFFFF_FFFF, 0x8000_0101) == 0b111


@pytest.mark.parametrize("index", [-1, 4, 1 << 40])
def test_deposit_refuses_what_does_not_fit(index: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        deposit(index, 0b11 << 20)


def test_capacity() -> None:
    assert [capacity(m) for m in (1, 0x300, 0x0FFF_0000)] == [1, 3, 4095]


#: Bits that the agent of each profile (and kube-proxy where it runs beside it) writes.
TAKEN = {
    MarkProfile.DEFAULT: 0x4000 | 0x8000 | 0x2000,
    MarkProfile.KUBE_PROXY: 0x4000 | 0x8000 | 0x2000,
    MarkProfile.KUBE_ROUTER: 0x1_0000 | 0x2_0000 | 0x4000 | 0x8000 | 0x3FFF,
    MarkProfile.AWS_VPC_CNI: 0x80 | 0x4000 | 0x8000,
    MarkProfile.TAILSCALE: 0x00FF_0000 | 0x4000 | 0x8000,
    MarkProfile.CALICO_IPTABLES: 0xFFFF_0000 | 0x4000 | 0x8000 | 0x2000,
    MarkProfile.CALICO_EBPF: 0xFFFF_0000 | 0x4000 | 0x8000,
    MarkProfile.OVN_KUBERNETES: 0x3F0 | 0x1745EC | 0x1001 | 0x1FFF,
}


@pytest.mark.parametrize("profile", MarkProfile)
def test_profiles_stay_clear_of_their_agent(profile: MarkProfile) -> None:
    mask = PROFILES[profile].mask
    assert check_mask(mask) == mask
    assert mask & TAKEN[profile] == 0
    assert PROFILES[profile].reason
