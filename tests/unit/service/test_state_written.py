# SPDX-License-Identifier: Apache-2.0
"""What was just written is not read again; it is what anybody else reads."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from unittest import mock

import pytest

from datapath import state as state_module
from datapath.errors import InputError
from datapath.facts import IdFacts
from datapath.plan.rtnl import Slave
from datapath.reconcile.actual import Record, Saved
from datapath.state import Pending, State, StateDirectory, Undone, current_netns


def full() -> State:
    """Nothing is as it is by default."""
    return State(
        record=Record(
            {"net/ipv4/conf/eth0/rp_filter": Saved("1", "0")},
            frozenset({"eth0.7"}),
            frozenset({"eth0"}),
            frozenset({Slave("eth0", "vrf7")}),
        ),
        ids=(IdFacts(name="a", fwmark=0x10000, table=700001, slot=1, zone=7),),
        fwmark_mask=0x0FFF0000,
        generation=3,
        policy="version: 1\n# \u00fc\n",
        policy_name="p.yaml",
        ebpf_refused="no",
        netns=current_netns(),
        pending=Pending("token", 2, 17.25, ("probe",), "late"),
        undone=Undone("0" * 64, "late"),
        gateways_down={"a": (IPv4Address("192.0.2.1"), IPv6Address("2001:db8::1"))},
        egress_sets={"e": (ip_network("192.0.2.0/24"), ip_network("2001:db8::/64"))},
    )


def test_what_was_written_is_what_others_read(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    directory.save(full())
    with mock.patch.object(state_module, "_decode", side_effect=AssertionError("read again")):
        assert directory.load() == full()
    assert StateDirectory(tmp_path).load() == full()


def test_what_somebody_else_wrote_is_read(tmp_path: Path) -> None:
    directory, other = StateDirectory(tmp_path), StateDirectory(tmp_path)
    directory.save(full())
    other.save(State(netns=current_netns(), generation=4))
    assert directory.load().generation == 4


def test_a_state_of_another_namespace_is_refused_also_by_its_writer(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    directory.save(State(netns=1))
    with pytest.raises(InputError, match="another network namespace"):
        directory.load()
