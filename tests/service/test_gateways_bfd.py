# SPDX-License-Identifier: Apache-2.0
"""Gateways that are watched by BFD: FRR's own daemons on the node and on the gateways."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from ipaddress import ip_address
from pathlib import Path

import pytest

from datapath.kernel.bfd_sessions import BfdSessions
from tests.service.daemon import Daemon, wait_until
from tests.service.gateway_ground import Ground, gateway_address, policy_of, wait_for_route
from tools.lab.bfd import Bfd
from tools.lab.patience import PATIENCE

pytestmark = pytest.mark.root

NODE = ("203.0.113.50", "2001:db8:113::50")
FAMILIES = (4, 6)


def gateways(*numbers: int) -> set[str]:
    return {gateway_address(number, family) for number in numbers for family in FAMILIES}


class BfdGround:
    """Two gateways, and sessions of the node with both, in both families."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.ground = stack.enter_context(closing(Ground(folder, 2, clients=16, own_address=True)))
        self.node = stack.enter_context(Bfd(self.ground.ns, "eth0", sorted(gateways(1, 2))))
        self.routers = {
            number: stack.enter_context(Bfd(self.ground.routers[number], "eth0", NODE)) for number in (1, 2)
        }
        self.ground.policy.write_text(policy_of(range(1, 3), self.check()))
        self.node.wait_up(*gateways(1, 2))

    def check(self) -> str:
        check = f"{{method: bfd, interval_ms: 50, hold_s: 1, bfd_socket: {self.node.socket}}}"
        return f"    gateway_mode: active_standby\n    gateway_check: {check}\n"

    def wait_for_way(self, number: int) -> None:
        """Answers of both families go by that gateway."""
        for family in FAMILIES:
            wait_for_route(
                self.ground,
                family,
                has=gateway_address(number, family),
                lacks=gateway_address(3 - number, family),
            )


@pytest.fixture
def bfd(tmp_path: Path) -> Iterator[BfdGround]:
    with ExitStack() as stack:
        yield BfdGround(tmp_path, stack)


def downs(daemon: Daemon) -> list[str]:
    return sorted(event["gateway"] for event in daemon.events("gateway_down"))


def wait_for_down(daemon: Daemon, *numbers: int) -> None:
    """FRR takes up to ten seconds after a session came up; the daemon 30 s where it never saw it up again."""
    wait_until(
        lambda: downs(daemon) == sorted(gateways(*numbers)), f"gateways {numbers} are down", 90 * PATIENCE
    )


def test_a_gateway_goes_and_comes_back_with_its_session(bfd: BfdGround) -> None:
    ground = bfd.ground
    with Daemon(ground).started() as daemon:
        bfd.wait_for_way(1)
        bfd.routers[1].stop("bfdd", kill=True)
        wait_for_down(daemon, 1)
        bfd.wait_for_way(2)
        with ground.traffic(200, families=FAMILIES) as result:
            before = ground.sent_by(2)
            wait_until(lambda: ground.sent_by(2) > before + 200, "answers by the second")
        assert result["lost"] == 0, "the first gateway forwards as before, only BFD says that it is not there"
        bfd.routers[1].start("bfdd")
        bfd.wait_for_way(1)
        assert downs(daemon) == sorted(gateways(1))
        assert not daemon.events("gateway_cannot_be_asked")
        assert "all 4 that are watched answer" in ground.datapath("doctor").stdout


def test_a_node_without_bfdd_takes_no_gateway_for_down(bfd: BfdGround) -> None:
    """Nor when it is back: its sessions come up one after the other."""
    ground = bfd.ground
    with Daemon(ground).started() as daemon:
        bfd.wait_for_way(1)
        switched = len(daemon.events("gateways_switched"))
        bfd.node.stop("bfdd", kill=True)
        daemon.wait_for("gateway_cannot_be_asked", 4)
        time.sleep(1)
        events = daemon.events("gateway_cannot_be_asked")
        assert {event["gateway"] for event in events} == gateways(1, 2)
        assert all("no bfdd of FRR listens at" in event["reason"] for event in events)
        assert "no bfdd of FRR listens at" in ground.datapath("doctor").stdout
        bfd.node.start("bfdd")
        bfd.node.wait_up(*gateways(1, 2))
        time.sleep(1)
        assert not downs(daemon)
        assert len(daemon.events("gateways_switched")) == switched
        # They are asked again.
        bfd.routers[1].stop("bfdd", kill=True)
        wait_for_down(daemon, 1)
        bfd.wait_for_way(2)


def test_a_bfdd_that_hangs_takes_no_gateway_for_down(bfd: BfdGround) -> None:
    with Daemon(bfd.ground).started() as daemon:
        bfd.wait_for_way(1)
        bfd.node.pause("bfdd")
        daemon.wait_for("gateway_cannot_be_asked", 4)
        assert all(
            "has not answered" in event["reason"] for event in daemon.events("gateway_cannot_be_asked")
        )
        bfd.node.resume("bfdd")
        bfd.node.wait_up(*gateways(1, 2))
        time.sleep(1)
        assert not downs(daemon)
        bfd.routers[1].stop("bfdd", kill=True)
        wait_for_down(daemon, 1)
        bfd.wait_for_way(2)


def test_a_gateway_without_a_session_cannot_be_asked(bfd: BfdGround) -> None:
    ground = bfd.ground
    bfd.node.tell("configure terminal", "bfd", f"no peer {gateway_address(2, 4)} interface eth0")
    bfd.node.tell("configure terminal", "bfd", f"peer {gateway_address(2, 6)} interface eth0", "shutdown")
    with Daemon(ground).started() as daemon:
        daemon.wait_for("gateway_cannot_be_asked", 2)
        reasons = {event["gateway"]: event["reason"] for event in daemon.events("gateway_cannot_be_asked")}
        assert set(reasons) == gateways(2)
        assert "`peer 203.0.113.2 interface eth0`" in reasons[gateway_address(2, 4)]
        assert "shut down in FRR" in reasons[gateway_address(2, 6)]
        bfd.node.tell("configure terminal", "bfd", f"peer {gateway_address(2, 4)} interface eth0")
        bfd.node.tell(
            "configure terminal", "bfd", f"peer {gateway_address(2, 6)} interface eth0", "no shutdown"
        )
        bfd.node.wait_up(*gateways(1, 2))
        wait_until(lambda: "answer" in _gateways_of_doctor(ground), "all are asked")
        assert not downs(daemon)


def _gateways_of_doctor(ground: Ground) -> str:
    lines = ground.datapath("doctor").stdout.splitlines()
    return next((line for line in lines if "all 4 that are watched answer" in line), "")


ASK = """
import sys
from datapath.kernel.bfd_sessions import BfdSessions
try:
    BfdSessions("eth0", 4, sys.argv[1]).close()
    print("open")
except OSError as error:
    print(error.strerror)
"""


def test_the_packaged_unit_needs_the_group(bfd: BfdGround) -> None:
    """Its root may not override permissions."""
    bfd.node.socket.parent.chmod(0o755)
    bare = ["setpriv", "--inh-caps=-dac_override", "--bounding-set=-dac_override"]
    ask = [sys.executable, "-c", ASK, str(bfd.node.socket)]
    refused = bfd.ground.ns.run(*bare, "--clear-groups", *ask)
    assert "SupplementaryGroups=frrvty" in refused
    assert bfd.ground.ns.run(*bare, "--groups", "frrvty", *ask) == "open\n"


def test_one_question_serves_all_gateways_of_a_device(bfd: BfdGround) -> None:
    """And a connection that bfdd ends says so to each."""
    asker = bfd.ground.ns.call(lambda: BfdSessions("eth0", 4, str(bfd.node.socket)))
    first, second = (ip_address(gateway_address(number, 4)) for number in (1, 2))

    def ask_both() -> None:
        for target in (first, second):
            asker.ask(target, everybody=False)

    with closing(asker):
        for _ in range(3):
            bfd.ground.ns.call(ask_both)
            assert wait_until(asker.answers, "an answer") == {first, second}
            assert not asker.is_waiting()
            assert asker.answers() == set(), "said once"
            assert (asker.trouble(first), asker.trouble(second)) == ("", "")
        bfd.node.stop("bfdd")
        assert asker.answers() == set()
        assert "no bfdd of FRR" in asker.trouble(first)
        with pytest.raises(OSError, match="no bfdd of FRR"):
            bfd.ground.ns.call(lambda: asker.ask(second, everybody=False))
