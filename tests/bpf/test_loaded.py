# SPDX-License-Identifier: Apache-2.0
"""What holds for both programs: which of them can be read, and that a slot does not inherit counts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING

import pytest

from datapath.kernel import bpf
from datapath.kernel.bpf import attachments, steering
from datapath.kernel.bpf.loaded import Counter
from datapath.kernel.bpf.steering import LoadedSteering
from datapath.plan.steering import SteeredNetwork, SteeringProgram
from datapath.plan.tc import Direction
from tests.bpf.attaching import VLAN, program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datapath.kernel.bpf.loaded import LoadedProgram

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.usefixtures("wire")]

_SLOT = 3
_STEERED = SteeringProgram(
    devices=("trunk0",),
    networks=(
        SteeredNetwork(
            name="public",
            slot=_SLOT,
            device="trunk1",
            vips=(ip_network("192.0.2.0/24"),),
            gateways=(ip_address("192.0.2.1"),),
            on_link=(),
        ),
    ),
)
_UNREADABLE = "the attached program is of a version that cannot be read"
#: Prints the errno of the refusal.
_OPEN_IT = """
import sys
from datapath.errors import KernelError
from datapath.kernel.bpf import LoadedIngress
try:
    print(LoadedIngress.read(int(sys.argv[1]), LoadedIngress.read_meta))
except KernelError as error:
    print("errno", error.errno)
"""


@pytest.fixture
def ingress() -> Iterator[bpf.LoadedIngress]:
    with bpf.load_ingress(program(VLAN)) as loaded:
        bpf.attach(loaded, "trunk0")
        yield loaded


@pytest.fixture
def egress() -> Iterator[LoadedSteering]:
    with steering.load_steering(_STEERED, steering.observe_steering()) as loaded:
        attachments.attach(loaded.program_fd, "trunk0", Direction.EGRESS)
        yield loaded


def _make_foreign(loaded: LoadedProgram) -> None:
    meta = loaded.read_meta()
    loaded.write_meta(dataclasses.replace(meta, abi_version=meta.abi_version + 1))


def test_ingress_program_of_another_version_is_ours_and_is_replaced(ingress: bpf.LoadedIngress) -> None:
    assert bpf.compare_ingress(program(VLAN), bpf.observe_ingress()).is_empty
    _make_foreign(ingress)
    assert bpf.LoadedIngress.read(ingress.program_id, bpf.LoadedIngress.read_meta) is None
    state = bpf.observe_ingress()
    assert (state.attached, state.programs) == ({"trunk0": ingress.program_id}, {})
    assert bpf.compare_ingress(program(VLAN), state).reload == _UNREADABLE


def test_egress_program_of_another_version_is_ours_and_is_replaced(egress: LoadedSteering) -> None:
    assert steering.compare_steering(_STEERED, steering.observe_steering()).reload == ""
    _make_foreign(egress)
    assert LoadedSteering.read(egress.program_id, LoadedSteering.read_meta) is None
    state = steering.observe_steering()
    assert (state.attached, state.tables) == ({"trunk0": egress.program_id}, {})
    assert steering.compare_steering(_STEERED, state).reload == _UNREADABLE


def test_another_program_cannot_be_read_as_ours(ingress: bpf.LoadedIngress, egress: LoadedSteering) -> None:
    assert bpf.LoadedIngress.read(egress.program_id, bpf.LoadedIngress.read_meta) is None
    assert LoadedSteering.read(ingress.program_id, LoadedSteering.read_meta) is None


def test_without_the_right_to_look_nothing_is_said_of_the_program(ingress: bpf.LoadedIngress) -> None:
    asked = subprocess.run(
        ["setpriv", "--bounding-set", "-sys_admin", sys.executable, "-c", _OPEN_IT, str(ingress.program_id)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert asked.stdout == "errno 1\n"


def test_slot_that_is_taken_over_starts_at_zero_and_one_that_is_not_there_is_none(
    egress: LoadedSteering,
) -> None:
    egress.carry_counters({_SLOT: Counter(packets=5, bytes=500)})
    room = egress.map(egress.counter_names[0]).max_entries
    egress.clear_counters({_SLOT + 1, room, (1 << 32) - 1})
    assert egress.read_counters() == {_SLOT: Counter(packets=5, bytes=500)}
    egress.clear_counters({_SLOT})
    assert egress.read_counters() == {}
