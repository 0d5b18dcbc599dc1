# SPDX-License-Identifier: Apache-2.0
"""The policy file: models, loader with positions, and everything that can be wrong with it."""

from datapath.policy.addresses import IpAddress, VipRange
from datapath.policy.crosscheck import check_policy
from datapath.policy.egress import Egress
from datapath.policy.loader import LoadedPolicy, load_policy, parse_policy
from datapath.policy.marks import PROFILES, MarkProfile, capacity, deposit, extract
from datapath.policy.model import (
    RULE_BLOCK_SIZE,
    Backend,
    Marks,
    Network,
    Node,
    Policy,
    ReturnPath,
    ReversePath,
    Rules,
    Steering,
    Track,
)
from datapath.policy.probe import Probe
from datapath.policy.source import PolicySource, Position
from datapath.policy.vlan import VlanDevice
from datapath.policy.vrf import Vrf

__all__ = [
    "PROFILES",
    "RULE_BLOCK_SIZE",
    "Backend",
    "Egress",
    "IpAddress",
    "LoadedPolicy",
    "MarkProfile",
    "Marks",
    "Network",
    "Node",
    "Policy",
    "PolicySource",
    "Position",
    "Probe",
    "ReturnPath",
    "ReversePath",
    "Rules",
    "Steering",
    "Track",
    "VipRange",
    "VlanDevice",
    "Vrf",
    "capacity",
    "check_policy",
    "deposit",
    "extract",
    "load_policy",
    "parse_policy",
]
