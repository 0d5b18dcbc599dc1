# SPDX-License-Identifier: Apache-2.0
"""A port of a bridge is refused: the IP stack gets its packets on the bridge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.netns.nodes import node

pytestmark = [pytest.mark.root, pytest.mark.bpf]

POLICY = """\
version: 1
networks:
  - name: public
    interface: {device}
    vips: [198.51.100.0/24, "2001:db8:1::/64"]
    gateway: [198.51.100.1, "2001:db8:1::1"]
"""


@pytest.mark.kernel_feature("bridge")
def test_bridge_port_is_refused_and_the_bridge_named(tmp_path: Path) -> None:
    with node(4) as made:
        made.namespace.ip(
            [
                "link add master0 type bridge",
                "link set eth1 down",
                "link set eth1 master master0",
                "link set eth1 up",
                "link set master0 up",
            ]
        )
        policy = tmp_path / "policy.yaml"
        policy.write_text(POLICY.format(device="eth1"))
        refused = made.datapath(tmp_path / "state", "apply", str(policy))
        assert refused.returncode == 1
        assert "eth1 is a port of master0" in refused.stderr
        policy.write_text(POLICY.format(device="master0"))
        done = made.datapath(tmp_path / "state", "apply", str(policy))
        assert done.returncode == 0, done.stderr
