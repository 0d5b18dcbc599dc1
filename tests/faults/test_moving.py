# SPDX-License-Identifier: Apache-2.0
"""The move of a device from its filter to tcx is killed, or refused, at each of its points: it is served all the same.

What is left of it is no drift, the next move goes on from there, and a teardown leaves nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.plan.tc import FEW_DEVICES, MANY_DEVICES
from tests.faults.leaks import objects_with_mask
from tests.faults.test_refusals import MASK
from tests.faults.zygote import Zygote
from tests.netns.nodes import Node, node
from tests.service.crowd import Ways, add_devices, networks, ways
from tests.service.daemon import wait_until

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow, pytest.mark.kernel_feature("tcx")]

NAMES = [f"many{number}" for number in range(MANY_DEVICES)]
#: Of one device.
POINTS = 2


@pytest.fixture
def bare() -> Iterator[Node]:
    with node(4) as built:
        add_devices(built.namespace, NAMES)
        yield built


def test_move_is_killed_or_refused_at_every_point(bare: Node, tmp_path: Path) -> None:
    state, policy = tmp_path / "state", tmp_path / "policy.yaml"
    policy.write_text(f"version: 1\nbackend: ebpf\nmarks: {{mask: {MASK:#x}}}\nnetworks:\n{networks(NAMES)}")
    everywhere = frozenset(NAMES)
    with Zygote(bare.namespace) as zygote:

        def is_served() -> Ways:
            now = ways(bare.namespace)
            assert now.filters | now.programs == everywhere
            assert not zygote.ask("drift", state)["drift"]
            left = zygote.ask("apply", state, policy=str(policy))
            assert (left["error"], left["changed"]) == ("", False)
            assert ways(bare.namespace) == now
            return now

        assert not zygote.ask("apply", state, policy=str(policy))["error"]
        assert is_served() == Ways(everywhere, frozenset(), everywhere)
        whole = zygote.ask("move", state, devices=1)["points"]
        assert [name.split(" many", 1)[0] for name in whole] == [
            "attach the ingress program to",
            "delete the ingress filter of",
        ]
        moved = 1
        for at, way in ((0, "kill_at"), (1, "kill_at"), (0, "fail_at"), (1, "fail_at")):
            answer = zygote.ask("move", state, devices=1, errno=errno.ENOMEM, **{way: at})
            assert answer.get("killed", False) is (way == "kill_at")
            now = is_served()
            assert (len(now.programs), len(now.filters)) == (moved + at, len(NAMES) - moved)
            # The next one finishes what this one began.
            answer = zygote.ask("move", state, devices=1)
            assert len(answer["points"]) == POINTS - at
            assert answer["fds"] == 0
            moved += 1
            now = is_served()
            assert (len(now.programs), len(now.filters)) == (moved, len(NAMES) - moved)
        # The last few are no few of an older version.
        zygote.ask("move", state, devices=len(NAMES) - moved - FEW_DEVICES // 2)
        assert len(is_served().filters) == FEW_DEVICES // 2
        zygote.ask("move", state, devices=len(NAMES))
        assert is_served() == Ways(frozenset(), everywhere, everywhere)
        assert not zygote.ask("teardown", state)["error"]
    assert ways(bare.namespace) == Ways(frozenset(), frozenset(), frozenset())
    wait_until(lambda: set(objects_with_mask(MASK).values()) == {0}, "no program and no map is left")
