# SPDX-License-Identifier: Apache-2.0
"""Fwmark masks: which bits of the 32-bit packet and connection mark may be ours, and how ids map to them.

No mark bit is free on every node, so the mask is a setting. The profiles are known-good masks for the
agents that write marks on Kubernetes nodes; each says what it stays clear of.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

#: skb->mark and ct mark are 32 bits wide.
MARK_MAX = 0xFFFF_FFFF

#: More bits than this are never needed (4,095 networks take 12) and only take bits away from others.
MASK_BITS_MAX = 16


class MarkProfile(enum.StrEnum):
    """`marks.profile`: a fwmark mask by the name of the agent that it lives beside."""

    DEFAULT = "default"
    KUBE_PROXY = "kube-proxy"
    KUBE_ROUTER = "kube-router"
    AWS_VPC_CNI = "aws-vpc-cni"
    TAILSCALE = "tailscale"
    CALICO_IPTABLES = "calico-iptables"
    CALICO_EBPF = "calico-ebpf"
    OVN_KUBERNETES = "ovn-kubernetes"


@dataclass(frozen=True, slots=True)
class ProfileMask:
    """A mask and why these bits.

    Attributes:
        mask: the bits that are ours.
        reason: whose bits it stays clear of.
    """

    mask: int
    reason: str


#: Sources: the marks that each project documents or sets in its code.
PROFILES: dict[MarkProfile, ProfileMask] = {
    MarkProfile.DEFAULT: ProfileMask(
        0x0FFF_0000,
        "kube-proxy masquerades with 0x4000 and used to drop with 0x8000, the portmap plug-in uses 0x2000; "
        "flannel and kindnet set no marks",
    ),
    MarkProfile.KUBE_PROXY: ProfileMask(0x0FFF_0000, "the same as `default`"),
    MarkProfile.KUBE_ROUTER: ProfileMask(
        0x0FFC_0000, "kube-router's network policies use 0x10000 and 0x20000, its services the bits below"
    ),
    MarkProfile.AWS_VPC_CNI: ProfileMask(
        0x0FFF_0000, "the AWS VPC CNI uses 0x80, kube-proxy 0x4000 and 0x8000"
    ),
    MarkProfile.TAILSCALE: ProfileMask(
        0x7F00_0000, "Tailscale owns 0x00ff0000 (0x40000 and 0x80000 are in use)"
    ),
    MarkProfile.CALICO_IPTABLES: ProfileMask(
        0x0000_0F00, "Calico's iptables and nftables data planes own 0xffff0000, kube-proxy 0x4000 and 0x8000"
    ),
    MarkProfile.CALICO_EBPF: ProfileMask(
        0x0000_1F00,
        "Calico's eBPF data plane owns 0x1ff00000 and up and its policy 0xffff0000; no kube-proxy runs",
    ),
    MarkProfile.OVN_KUBERNETES: ProfileMask(
        0x7FE0_0000,
        "OVN-Kubernetes sets the whole marks 0x3f0, 0x1745ec and 0x1001 plus a network id: bits 0 to 20",
    ),
}

#: Agents that leave no room, with what to tell their users.
REFUSED_PROFILES: dict[str, str] = {
    "cilium": (
        "Cilium keeps the identity of the sender in 0xffff00ff and its own meanings in 0x0000ff00: no bit of "
        "the packet mark is free beside it"
    ),
}


def capacity(mask: int) -> int:
    """How many networks a mask can tell apart: all combinations of its bits but zero (unmarked)."""
    return int((1 << mask.bit_count()) - 1)


def _shift(mask: int) -> int:
    """Of its lowest bit: masks without gaps, which is most, need no more."""
    return max((mask & -mask).bit_length() - 1, 0)


def deposit(index: int, mask: int) -> int:
    """Spread the low bits of ``index`` over the set bits of ``mask``, lowest first (x86 ``pdep``).

    Args:
        index: 0..``capacity(mask)``.
        mask: any set of bits, also one with gaps.

    Raises:
        ValueError: the index does not fit into the mask.
    """
    if not 0 <= index <= capacity(mask):
        raise ValueError(f"index {index} does not fit into mask {mask:#x}")
    shift = _shift(mask)
    if mask >> shift == capacity(mask):
        return index << shift
    mark = 0
    while index:
        lowest = mask & -mask
        if index & 1:
            mark |= lowest
        mask ^= lowest
        index >>= 1
    return mark


def extract(mark: int, mask: int) -> int:
    """Gather the bits of ``mark`` that are in ``mask`` into a small number (x86 ``pext``).

    The inverse of `deposit`; bits outside the mask are ignored.
    """
    shift = _shift(mask)
    if mask >> shift == capacity(mask):
        return (mark & mask) >> shift
    index = 0
    position = 0
    while mask:
        lowest = mask & -mask
        if mark & lowest:
            index |= 1 << position
        mask ^= lowest
        position += 1
    return index
