# SPDX-License-Identifier: Apache-2.0
"""The gateways that the policy in force has watched: asks them in turn, and says which are down.

Nothing here waits, and nothing is judged by the clock: a question counts as unanswered when the next one is due and
everything that came in meanwhile has been read. So a daemon that was busy for seconds takes nobody for dead.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from datapath.kernel.carrier import NO_CARRIER
from datapath.kernel.gateway_questions import Questions
from datapath.kernel.gateway_wires import Wire
from datapath.log import get_logger
from datapath.observe.stats import ServiceStats
from datapath.plan.gateways import CheckMethod, GatewayCheck
from datapath.plan.ingress import address_order
from datapath.service.gateway_health import Health

Address = IPv4Address | IPv6Address
Down = dict[str, tuple[Address, ...]]
#: Addresses of devices change, and nobody says so here; link-local ones come by themselves.
_SOURCES_S = 5.0
#: A switch learns for half a minute what is behind a port that came up, where nobody told it not to (802.1D).
_SETTLE_S = 30.0
_SILENT = "nobody on the device has answered since it could be asked again"
#: The socket is as good as before when it is over.
_PASSING = (errno.EADDRNOTAVAIL, errno.ENOLINK)
#: The device is down, or away (`if_nametoindex` gives no number). Whatever else is wrong with one address says nothing
#: about the link, and must not keep the other gateways from being judged.
_LINK_ERRORS = (None, errno.ENOLINK, errno.ENETDOWN, errno.ENODEV, errno.ENXIO)


@dataclass(frozen=True, slots=True)
class Change:
    """A gateway that went up or down, or cannot be asked (any more): then `problem` says why."""

    check: GatewayCheck
    is_up: bool
    hold_s: float = 0.0
    problem: str = ""


class GatewayWatch:
    """Asks the gateways of the plan in force."""

    def __init__(self) -> None:
        self._checks: tuple[GatewayCheck, ...] = ()
        self._health: dict[tuple[str, Address], Health] = {}
        self._asked: set[tuple[str, Address]] = set()
        self._due: dict[float, float] = {}
        self._settling: dict[object, float] = {}
        self._wires: dict[Wire, Questions] = {}
        self._sources_at_s = 0.0

    def close(self) -> None:
        for wire in self._wires.values():
            wire.close()
        self._wires.clear()

    def follow(
        self, checks: tuple[GatewayCheck, ...], down: Mapping[str, Iterable[Address]], now_s: float
    ) -> None:
        """Watch these from now on.

        Args:
            checks: of the plan in force.
            down: as they were known last; for those that are new here.
            now_s: monotonic clock.
        """
        if checks == self._checks:
            return
        self._checks = checks
        before, self._health = self._health, {}
        for check in checks:
            health = before.get(check.key)
            if health is None or health.check.device != check.device:
                health = Health(check, is_up=check.address not in down.get(check.network, ()))
                self._asked.discard(check.key)
            health.check = check
            self._health[check.key] = health
        self._asked &= set(self._health)
        intervals = {check.interval_s for check in checks}
        self._due = {interval: self._due.get(interval, now_s) for interval in intervals}
        needed = {_wire(check) for check in checks}
        for wire in set(self._wires) - needed:
            self._wires.pop(wire).close()

    @property
    def down(self) -> Down:
        """By network."""
        found: dict[str, list[Address]] = {}
        for (network, address), health in self._health.items():
            if not health.is_up:
                found.setdefault(network, []).append(address)
        return {network: tuple(sorted(addresses, key=address_order)) for network, addresses in found.items()}

    @property
    def unasked(self) -> frozenset[tuple[str, Address]]:
        """Those that cannot be asked now."""
        return frozenset(key for key, health in self._health.items() if health.problem)

    @property
    def health(self) -> Mapping[tuple[str, Address], Health]:
        return self._health

    def next_s(self) -> float | None:
        """When `ask` has something to do; None where nothing is watched."""
        return min(self._due.values(), default=None)

    def ask(self, now_s: float) -> list[Change]:
        """Judge the questions before, and ask those that are due."""
        due = {interval for interval, at in self._due.items() if at <= now_s}
        for interval in due:
            self._due[interval] = max(self._due[interval] + interval, now_s + interval / 2)
        if now_s >= self._sources_at_s:
            self._sources_at_s = now_s + _SOURCES_S
            for wire in self._wires.values():
                wire.forget_sources()
        answers = {wire: opened.answers() for wire, opened in self._wires.items()}
        # Looked at before anybody asks anew.
        waiting = {wire for wire, opened in self._wires.items() if opened.is_waiting()}
        changes: list[Change] = []
        for check in self._checks:
            health = self._health[check.key]
            if check.address in answers.get(_wire(check), ()):
                self._asked.discard(check.key)
                self._settling.pop(_settles_with(check), None)
                if health.answered(now_s):
                    changes.append(Change(check, is_up=True))
            if check.interval_s not in due or _wire(check) in waiting:
                continue
            problem = self._link_problem(check, health, now_s)
            if not problem and check.key in self._asked and health.missed(now_s):
                changes.append(Change(check, is_up=False, hold_s=health.hold_s))
            changes += self._ask_one(check, health, problem, now_s)
        return changes

    def _link_problem(self, check: GatewayCheck, health: Health, now_s: float) -> str:
        """Why the last question may not have got out. Only looked at where it matters: the kernel may take its time."""
        wire, was_asked = self._wires.get(_wire(check)), check.key in self._asked
        if wire is not None and was_asked and (trouble := wire.trouble(check.address)):
            return trouble
        if wire is None or not (health.problem or (health.is_up and was_asked)):
            return ""
        if not wire.has_carrier():
            return NO_CARRIER
        return _SILENT if was_asked and now_s < self._settling.get(_settles_with(check), now_s) else ""

    def _ask_one(self, check: GatewayCheck, health: Health, problem: str, now_s: float) -> list[Change]:
        """One that cannot be asked is left as it is: that says something about this node, not about the gateway."""
        self._asked.discard(check.key)
        before, is_link = health.problem, problem == NO_CARRIER
        try:
            if problem != NO_CARRIER:
                self._open(check).ask(check.address, everybody=health.misses > 0)
                self._asked.add(check.key)
        except OSError as error:
            problem, is_link = error.strerror or str(error), error.errno in _LINK_ERRORS
            if error.errno not in _PASSING:
                self._close(check)
        if is_link or (check.method is CheckMethod.BFD and problem not in ("", _SILENT)):
            self._settling[_settles_with(check)] = now_s + _SETTLE_S
        if problem:
            health.interrupted()
        health.problem = problem
        return [Change(check, health.is_up, problem=problem)] if problem and problem != before else []

    def _close(self, check: GatewayCheck) -> None:
        """There may be another device of that name by now."""
        wire = self._wires.pop(_wire(check), None)
        if wire is not None:
            wire.close()

    def _open(self, check: GatewayCheck) -> Questions:
        key = _wire(check)
        wire = self._wires.get(key)
        if wire is None:
            wire = self._wires[key] = key.open()
        return wire


def report_change(change: Change, down: Down, stats: ServiceStats) -> None:
    """Log and count it; `down` are all that are down now."""
    log, check = get_logger(), change.check
    names = {"network": check.network, "gateway": str(check.address), "device": check.device}
    if change.problem:
        log.warning("gateway_cannot_be_asked", **names, reason=change.problem, taken_for=_word(change.is_up))
        return
    stats.gateways[check.key] = change.is_up
    if change.is_up:
        log.warning("gateway_up", **names)
        return
    stats.gateway_failures[check.key] += 1
    log.warning("gateway_down", **names, unanswered=check.multiplier, stays_unused_s=round(change.hold_s, 1))
    family = check.address.version
    if all(
        not up for key, up in stats.gateways.items() if key[0] == check.network and key[1].version == family
    ):
        log.error(
            "gateways_all_down",
            network=check.network,
            gateways=[str(address) for address in down[check.network] if address.version == family],
            hint="all of them are used as if they were up: look at the network, or at what keeps them from answering",
        )


def _word(is_up: bool) -> str:
    return "up" if is_up else "down"


def _wire(check: GatewayCheck) -> Wire:
    return Wire(check.device, check.address.version, check.method, check.bfd_socket)


def _settles_with(check: GatewayCheck) -> object:
    """Where one answers, the link is fine for all. Sessions of BFD come up one by one after FRR was restarted."""
    return check.key if check.method is CheckMethod.BFD else check.device
