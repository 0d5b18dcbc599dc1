# SPDX-License-Identifier: Apache-2.0
"""Devices that were many when they came get tcx from the daemon bit by bit; to interrupt that breaks nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator

import pytest

from tests.service.crowd import Crowd, Ways
from tests.service.daemon import Daemon, wait_until
from tools.lab import Lab, network
from tools.lab.flows import Traffic, all_flows

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow, pytest.mark.kernel_feature("tcx")]

#: Some have moved, most have not: what is done then falls into the middle.
SOME = 3
MOVE_S = 180.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab(networks=[network(0), network(1)], datagrams=False) as built:
        yield built


@pytest.fixture(scope="module")
def made(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    return Crowd(tmp_path_factory.mktemp("crowd"), lab)


@pytest.fixture
def crowd(made: Crowd) -> Iterator[Crowd]:
    """Served by filters, all of them: `datapath apply` does not wait for tcx."""
    made.policy.write_text(made.text)
    done = made.datapath("apply", str(made.policy))
    assert done.returncode == 0, done.stderr
    assert made.ways() == Ways(made.devices, frozenset(), made.devices)
    yield made
    made.datapath("teardown")


def _some_moved(crowd: Crowd) -> Ways:
    def found() -> Ways | None:
        now = crowd.ways()
        assert now.filters | now.programs == crowd.devices
        return now if len(now.programs) >= SOME else None

    now: Ways = wait_until(found, "some devices have moved", MOVE_S)
    assert now.filters, "all have moved: nothing is in the middle any more"
    return now


def _all_moved(crowd: Crowd) -> None:
    wait_until(lambda: not crowd.ways().filters, "all devices have moved", MOVE_S)
    now = crowd.ways()
    # An empty qdisc costs nothing, and taking it off would cost packets.
    assert (now.programs, now.clsact, crowd.record()) == (crowd.devices,) * 3


def _status(crowd: Crowd) -> dict[str, list[str]]:
    done = crowd.datapath("status", "--json")
    document: dict[str, list[str]] = json.loads(done.stdout)
    assert done.returncode == 0, document["drift"]
    return document


def _is_gone(crowd: Crowd) -> None:
    assert crowd.ways() == Ways(frozenset(), frozenset(), frozenset())


def test_all_devices_move_and_no_packet_of_theirs_is_lost(crowd: Crowd, lab: Lab) -> None:
    with Traffic(lab, all_flows(lab.networks), rate=500) as traffic:
        traffic.wait_turns()
        with Daemon(crowd) as daemon:
            daemon.started()
            _some_moved(crowd)
            assert any("have a tc filter" in note for note in _status(crowd)["notes"])
            wait_until(lambda: daemon.events("programs_moved"), "all have moved", MOVE_S)
            traffic.wait_turns()
            _all_moved(crowd)
            assert not any("have a tc filter" in note for note in _status(crowd)["notes"])
            assert daemon.stop() == 0
    out = traffic.outcome
    assert out.packets > 0
    assert (out.lost, out.doubled, out.misrouted, out.timeouts, out.failed) == (0, 0, 0, 0, []), out
    assert not daemon.events("drift_healed")
    assert not daemon.events("program_not_moved")
    assert daemon.wait_for("programs_moved")["devices"] == len(crowd.devices)
    assert crowd.datapath("teardown").returncode == 0
    _is_gone(crowd)


def test_whoever_kills_it_in_the_middle_leaves_what_the_next_goes_on_with(crowd: Crowd) -> None:
    with Daemon(crowd) as daemon:
        daemon.started()
        _some_moved(crowd)
        daemon.stop(signal.SIGKILL)
    left = crowd.ways()
    assert left.filters | left.programs == crowd.devices == crowd.record()
    assert left.filters
    assert not _status(crowd)["drift"]
    done = crowd.datapath("apply", str(crowd.policy), "--json")
    assert done.returncode == 0, done.stderr
    assert crowd.ways() == left
    with Daemon(crowd) as daemon:
        _all_moved(crowd)
        assert daemon.wait_for("programs_moved")["devices"] == len(left.filters)
        assert not daemon.events("drift_healed")
        assert daemon.stop(signal.SIGTERM) == 0
    assert crowd.datapath("teardown").returncode == 0
    _is_gone(crowd)


def test_an_apply_in_the_middle_moves_nothing_back(crowd: Crowd) -> None:
    with Daemon(crowd) as daemon:
        daemon.started()
        before = _some_moved(crowd)
        # The mask is compiled in: another program replaces each where it is.
        crowd.policy.write_text(crowd.text + "marks: {mask: 0x0ff00000}\n")
        wait_until(lambda: len(daemon.events("policy_in_force")) > 1, "the new policy", MOVE_S)
        after = crowd.ways()
        assert after.programs >= before.programs - before.filters
        assert after.filters | after.programs == crowd.devices
        assert not _status(crowd)["drift"]
        wait_until(lambda: not crowd.ways().filters, "it goes on", MOVE_S)
        _all_moved(crowd)
        assert not daemon.events("drift_healed")


def test_a_teardown_in_the_middle_leaves_nothing_behind(crowd: Crowd) -> None:
    with Daemon(crowd) as daemon:
        daemon.started()
        _some_moved(crowd)
        done = crowd.datapath("teardown")
        assert done.returncode == 0, done.stderr
        _is_gone(crowd)
        # Longer than it waits after the last event: it would go on now.
        time.sleep(2)
        _is_gone(crowd)
        assert daemon.stop() == 0
    _is_gone(crowd)
    assert not daemon.events("program_not_moved")
    assert not daemon.events("reconcile_failed")


def test_a_sigterm_in_the_middle_leaves_all_served(crowd: Crowd) -> None:
    with Daemon(crowd) as daemon:
        daemon.started()
        _some_moved(crowd)
        assert daemon.stop() == 0
    left = crowd.ways()
    assert left.filters | left.programs == crowd.devices
    assert not left.filters & left.programs
    assert not _status(crowd)["drift"]
