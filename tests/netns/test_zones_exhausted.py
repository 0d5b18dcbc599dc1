# SPDX-License-Identifier: Apache-2.0
"""No zone is left: the network is refused where the policy names it, who has them is said, and nothing changes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.compiler.zone_ids import ZONE_BASE, ZONE_LAST
from tests.netns.nodes import Node, node

pytestmark = pytest.mark.root

PLAIN = """\
version: 1
backend: nft
networks:
  - {name: a, interface: eth1, vips: [198.51.100.0/24], gateway: 198.51.100.1%s}
  - {name: b, interface: eth2, vips: [203.0.113.0/24], gateway: 203.0.113.1%s}
"""
ISOLATED = ", isolate_clients: true"
#: Of the whole range, as a map that somebody's rule looks zones up in.
HOG = """
table inet hog {{
  map zones {{ typeof meta mark : ct zone; elements = {{ {elements} }}; }}
  chain c {{ type filter hook prerouting priority raw; ct original zone set meta mark map @zones; }}
}}
"""


class User:
    """Applies policies, and reads what is said."""

    def __init__(self, made: Node, folder: Path) -> None:
        self.node, self._folder = made, folder
        self._state = folder / "state"

    def run(self, verb: str, text: str = "", *, status: int = 0) -> str:
        arguments = []
        if text:
            path = self._folder / "policy.yaml"
            path.write_text(text)
            arguments = [str(path)]
        done = self.node.datapath(self._state, verb, *arguments)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def ruleset(self) -> str:
        return re.sub(r"packets \d+ bytes \d+", "", self.node.run("nft", "list", "table", "inet", "datapath"))

    def hog(self, first: int, last: int = ZONE_LAST) -> None:
        """Somebody uses these zones of our range."""
        zones = enumerate(range(first, last + 1), 1)
        self.node.namespace.nft(HOG.format(elements=", ".join(f"{mark} : {zone}" for mark, zone in zones)))


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    with node(4) as made:
        yield User(made, tmp_path)


def test_a_network_that_gets_no_zone_is_refused_and_the_policy_before_stays(user: User) -> None:
    before = PLAIN % (ISOLATED, "")
    user.run("apply", before)
    user.hog(ZONE_BASE + 2)
    ruleset = user.ruleset()
    said = user.run("apply", PLAIN % (ISOLATED, ISOLATED), status=2)
    # File and line, what is wrong, whose fault it is, and the way out.
    assert "policy.yaml:5:" in said
    assert "no connection-tracking zone is left for network b" in said
    assert "nft table inet hog, chain c" in said
    assert "pin `zone` to a free one outside that range" in said
    assert user.ruleset() == ruleset
    status = user.run("status")
    assert "no drift" in status
    assert str(ZONE_BASE + 1) in status
    # The way out is one, and when somebody gives one back it needs no pin.
    user.run("apply", PLAIN % (ISOLATED, f"{ISOLATED}, zone: 39000"))
    user.node.namespace.nft("delete table inet hog")
    user.run("apply", PLAIN % (ISOLATED, ISOLATED))
    assert "no drift" in user.run("status")


def test_zones_that_others_take_later_are_named_and_not_fled_from(user: User) -> None:
    """What we have is not moved by itself: open connections would pause for a thing that may be harmless."""
    user.run("apply", PLAIN % (ISOLATED, ISOLATED))
    user.hog(ZONE_BASE + 1, ZONE_BASE + 2)
    ruleset = user.ruleset()
    user.run("apply", PLAIN % (ISOLATED, ISOLATED))
    assert user.ruleset() == ruleset
    said = user.run("doctor")
    assert f"zone {ZONE_BASE + 1} of network a is used by nft table inet hog, chain c, too" in said
    assert f"set `zone: {ZONE_BASE + 3}` (nobody uses it)" in said
    user.node.namespace.nft("delete table inet datapath")
    assert "nft transaction" in user.run("status", status=3)
    user.run("apply", PLAIN % (ISOLATED, ISOLATED))
    assert user.ruleset() == ruleset, "healed to the same zones"
