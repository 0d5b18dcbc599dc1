# SPDX-License-Identifier: Apache-2.0
"""The daemon's loop: one thread, one selector, a handful of timers.

Fail-static: whatever ends this process leaves the datapath as it is. An expected failure is logged and tried
again; an unexpected one ends the process with its trace, and the service manager starts a new one.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from datapath.compiler import Compiler
from datapath.controller import Controller
from datapath.errors import BusyError, DatapathError
from datapath.kernel.guardian import seconds_left
from datapath.kernel.inotify import DirectoryWatch
from datapath.kernel.notify import Notifier, watchdog_interval_s
from datapath.kernel.observer import Sight
from datapath.kernel.watch import Event, Interest, NftWatch, RouteWatch
from datapath.log import get_logger
from datapath.observe.stats import ServiceStats
from datapath.plan.model import Plan
from datapath.reconcile.present import needed_devices
from datapath.reconcile.steps import kind_of
from datapath.service.gateways import GatewayWatch, report_change
from datapath.service.healer import Healer, Look
from datapath.service.memory import settle
from datapath.service.mover import Mover
from datapath.service.policy_files import PolicyFiles
from datapath.service.reload import UNDO_GRACE_S, Reloader
from datapath.service.timers import Action, Timers, interval_s
from datapath.state import DAEMON_LOCK, State, StateDirectory

#: Events come in bursts: wait until it is quiet for a moment, but no longer than the second of these.
QUIET_S = 0.005
BURST_S = 0.04
FILES_QUIET_S = 0.1
FILES_BURST_S = 1.0
#: Another process of ours holds the state.
BUSY_RETRY_S = 0.02
FAILED_RETRY_S = 5.0
#: What no event tells of (arp_ignore, the contents of eBPF maps, a lost watch) is found by looking.
RESYNC_S = 300.0
SYSCTL_POLL_S = 120.0
#: No event tells of a tcx program that somebody detaches; asking costs microseconds a device.
PROGRAMS_POLL_S = 10.0
#: What looking without an event may take of a processor; together no more than 0.2 %.
RESYNC_SHARE = 0.001
SYSCTL_POLL_SHARE = 0.0005
PROGRAMS_POLL_SHARE = 0.0005
#: After a repair.
CONFIRM_S = 1.0
#: After a look, which keeps the state: to collect garbage among thousands of networks takes a while.
SETTLE_S = 10.0
FILES_POLL_S = 10.0
_EVENTS_MAX = 50
_LISTENS_MAX = 16


class Service:
    """`datapath run`."""

    def __init__(self, directory: StateDirectory, files: PolicyFiles, stats: ServiceStats) -> None:
        self._directory = directory
        self._files = files
        self._stats = stats
        self._log = get_logger()
        self._notifier = Notifier()
        compiler = Compiler()
        self._healer = Healer(directory, compiler)
        self._gateways = GatewayWatch()
        self._controller = Controller(
            directory, wait_for_devices=True, sight=self._present_sight, compiler=compiler
        )
        self._reloader = Reloader(directory, files, self._controller, stats)
        self._timers = Timers()
        self._mover = Mover(directory, self._timers, stats, self._healer.program_moved)
        self._events: list[Event] = []
        self._stopping = False
        self._is_able = True
        self._conflicts: tuple[str, ...] = ()
        self._last_by: list[str] = []

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            BusyError: another daemon serves this state directory.
            InputError: the policy is wrong, and there is no earlier one to go on with.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._directory.locked(wait_s=0, name=DAEMON_LOCK))
            self._selector = stack.enter_context(selectors.DefaultSelector())
            stack.callback(self._healer.close)
            stack.callback(self._gateways.close)
            stack.enter_context(self._signals())
            self._open_watches(stack)
            self._retry_later(self._reloader.start())
            self._settle()
            self._listen()  # to the echo of what was just done, which would be a reason to look again
            self._look()
            self._settle()
            self._start_timers()
            self._notifier.ready(self._status())
            self._log.info("service_started", status=self._status(), pid=os.getpid())
            while not self._stopping:
                for key, _ in self._selector.select(self._timers.wait_s(time.monotonic())):
                    key.data()
                for action in self._timers.due(time.monotonic()):
                    action()
            self._notifier.stopping()
            self._log.info("service_stopped", datapath="stays")

    def _open_watches(self, stack: contextlib.ExitStack) -> None:
        """Before the first look: what happens after it is seen."""
        self._routes, self._nft, self._directories = RouteWatch(), NftWatch(), DirectoryWatch()
        for watch, action in (
            (self._routes, lambda: self._take(self._routes.read())),
            (self._nft, lambda: self._take(self._nft.read())),
            (self._directories, self._take_file_events),
        ):
            stack.callback(watch.close)
            self._selector.register(watch, selectors.EVENT_READ, action)
        self._directories.watch(self._files.directories())

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals as bytes in a pipe: nothing happens between two instructions of a repair."""
        read_end, write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = [signal.signal(number, lambda *_: None) for number in handled]
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

        def take() -> None:
            for number in os.read(read_end, 64):
                if number == signal.SIGHUP:
                    self._reload()
                elif number in handled:
                    self._stopping = True

        self._selector.register(read_end, selectors.EVENT_READ, take)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in zip(handled, before, strict=True):
                signal.signal(number, handler)
            os.close(read_end)
            os.close(write_end)

    def _start_timers(self) -> None:
        now = time.monotonic()
        self._timers.set(self._poll_files, now + FILES_POLL_S)
        self._timers.set(self._resync, now + RESYNC_S)
        self._timers.set(self._poll_sysctls, now + SYSCTL_POLL_S)
        self._timers.set(self._poll_programs, now + PROGRAMS_POLL_S)
        if watchdog_interval_s() is not None:
            self._feed_watchdog()

    def _feed_watchdog(self) -> None:
        """Only while the last look at the kernel worked: a loop that merely turns is of no use to anybody."""
        if self._is_able:
            self._notifier.alive()
        interval = watchdog_interval_s()
        if interval is not None:
            self._timers.set(self._feed_watchdog, time.monotonic() + interval)

    # Policy files

    def _take_file_events(self) -> None:
        self._directories.drain()
        self._mover.pause()
        self._timers.debounce(self._check_files, time.monotonic(), FILES_QUIET_S, FILES_BURST_S)

    def _poll_files(self) -> None:
        self._timers.set(self._poll_files, time.monotonic() + FILES_POLL_S)
        # A directory that was replaced is another one: its watch went with the old one.
        self._directories.watch(self._files.directories())
        self._check_files()
        self._undo_unconfirmed()

    def _check_files(self) -> None:
        if self._reloader.files_changed():
            self._reload()

    def _reload(self) -> None:
        self._notifier.reloading()
        self._apply_files()
        self._notifier.ready(self._status())

    def _apply_files(self) -> None:
        """Also the retry of an apply that failed for a reason outside of the files."""
        self._retry_later(self._reloader.apply())
        self._directories.watch(self._files.directories())
        self._resync()

    def _retry_later(self, delay_s: float | None) -> None:
        if delay_s is None:
            self._timers.cancel(self._apply_files)
        else:
            self._timers.set(self._apply_files, time.monotonic() + delay_s)

    def _undo_unconfirmed(self) -> None:
        """Who holds the clock of a change on probation may have died: then it is ours."""
        try:
            undone = self._reloader.undo_overdue()
        except DatapathError as error:
            self._log.error("rollback_failed", error=str(error), hint=error.hint)
        else:
            if undone:
                self._resync()

    # Gateways

    def _ask_gateways(self) -> None:
        now = time.monotonic()
        changes = self._gateways.ask(now)
        self._stats.gateways_unasked = self._gateways.unasked
        self._ask_gateways_later()
        for change in changes:
            report_change(change, self._gateways.down, self._stats)
        if any(not change.problem for change in changes):
            self._healer.set_down(self._gateways.down)
            self._look()

    def _ask_gateways_later(self) -> None:
        at_s = self._gateways.next_s()
        if at_s is None:
            self._timers.cancel(self._ask_gateways)
        else:
            self._timers.set(self._ask_gateways, at_s)

    def _follow_gateways(self, plan: Plan, state: State) -> None:
        self._gateways.follow(plan.checks, state.gateways_down, time.monotonic())
        self._stats.gateways = {key: health.is_up for key, health in self._gateways.health.items()}
        if self._gateways.down != state.gateways_down:
            # It speaks of gateways that the policy no longer has.
            self._healer.set_down(self._gateways.down)
            self._timers.earliest(self._look, time.monotonic())
        self._ask_gateways_later()

    # Drift

    def _resync(self) -> None:
        """Believe nothing that was read before, and take what was said before for no news."""
        with self._repeated(self._resync, RESYNC_S, RESYNC_SHARE):
            self._listen()
            self._healer.forget("*")
            self._look()
            # Listing our table as JSON takes ten megabytes for a moment.
            self._settle()

    def _poll_sysctls(self) -> None:
        with self._repeated(self._poll_sysctls, SYSCTL_POLL_S, SYSCTL_POLL_SHARE):
            self._healer.forget(["sysctl"])
            self._look()

    @contextlib.contextmanager
    def _repeated(self, action: Action, period_s: float, share: float) -> Iterator[None]:
        """Do it again after the period, or later where there is much to look at."""
        began_s = time.process_time()
        try:
            yield
        finally:
            took_s = time.process_time() - began_s
            self._timers.set(action, time.monotonic() + interval_s(period_s, took_s, share))

    def _poll_programs(self) -> None:
        try:
            with self._repeated(self._poll_programs, PROGRAMS_POLL_S, PROGRAMS_POLL_SHARE):
                changed = self._healer.programs_changed()
        except DatapathError as error:
            self._log.error("reconcile_failed", error=str(error), hint=error.hint)
            return
        if changed:
            self._look()

    def _confirm(self) -> None:
        """What was repaired is forgotten: read it back; then give back the memory that the repair needed."""
        self._look()
        self._settle()

    def _settle(self) -> None:
        self._timers.cancel(self._settle)
        self._directory.forget()
        settle()

    def _take(self, events: list[Event]) -> None:
        if not events:
            return
        self._healer.forget(event.kind for event in events)
        self._events += events[: _EVENTS_MAX - len(self._events)]
        self._mover.pause()
        self._timers.debounce(self._look, time.monotonic(), QUIET_S, BURST_S)

    def _present_sight(self) -> Sight:
        """For an apply: what was read before, without that which anything was, or could not be, heard of since."""
        if not self._listen():
            self._healer.forget("*")
        self._healer.sight.keep_heard()
        return self._healer.sight

    def _listen(self) -> bool:
        """Take in what was said up to now; False where there is no end of it."""
        for _ in range(_LISTENS_MAX):
            events = [*self._routes.read(), *self._nft.read()]
            self._healer.forget(event.kind for event in events)
            self._events += events[: _EVENTS_MAX - len(self._events)]
            if not self._routes.has_more() and not self._nft.has_more():
                return True
        return False

    def _look(self) -> None:
        """Compare and repair; whatever comes of it, there will be another look."""
        now = time.monotonic()
        self._timers.cancel(self._look)
        self._timers.earliest(self._settle, now + SETTLE_S)
        self._mover.pause()
        try:
            look = self._healer.look()
        except BusyError:
            self._timers.set(self._look, now + BUSY_RETRY_S)
            return
        except DatapathError as error:
            self._log.error("reconcile_failed", error=str(error), hint=error.hint)
            self._is_able = False
            self._timers.set(self._look, now + FAILED_RETRY_S)
            return
        self._is_able = True
        self._mover.follow(look.filtered)
        events, self._events = self._events, []
        self._account(look)
        self._report(look, events)
        self._after(look)

    def _account(self, look: Look) -> None:
        stats = self._stats
        stats.reconciles += 1
        stats.generation = look.state.generation
        stats.plan = look.plan
        stats.networks = look.networks
        stats.unhealed = len(look.failed) + len(look.held)
        stats.drift.update(kind_of(step) for step in look.done)
        stats.contested = frozenset(map(str, self._healer.backoff.contested()))

    def _report(self, look: Look, events: list[Event]) -> None:
        by = sorted({event.by for event in events if event.by})
        # An attempt that only waited for its time has no event of its own.
        self._last_by = by or self._last_by
        if look.done:
            seconds = time.monotonic() - min((event.at_s for event in events), default=look.began_s)
            self._stats.heals.observe(seconds)
            self._log.warning(
                "drift_healed",
                steps=[step.describe() for step in look.done],
                by=by or None,
                seen=sorted({event.what for event in events}) or ["found by looking"],
                heal_ms=round(seconds * 1000, 1),
            )
        if look.switched:
            self._log.warning("gateways_switched", steps=[step.describe() for step in look.switched])
        for step, error in look.failed:
            self._log.error("heal_failed", step=step.describe(), error=str(error), hint=error.hint)
        for key, delay in look.delays.items():
            self._log.warning(
                "drift_contested", what=key, by=by or self._last_by, next_attempt_in_s=round(delay, 1)
            )
        if look.conflicts != self._conflicts:
            self._conflicts = look.conflicts
            for text in look.conflicts:
                self._log.warning("conflict_found", conflict=text)
        waiting = frozenset(look.waiting)
        if waiting != self._stats.waiting:
            self._stats.waiting = waiting
            event = "networks_waiting" if waiting else "networks_complete"
            self._log.warning(event, networks=sorted(waiting))
            self._notifier.status(self._status())

    def _after(self, look: Look) -> None:
        now = time.monotonic()
        if look.state.pending is not None:
            # A change is on probation, and who holds its clock may die.
            left_s = seconds_left(look.state.pending)
            # From a clock that is read later: what comes too early finds that it is not overdue, and is over.
            self._timers.earliest(self._undo_unconfirmed, time.monotonic() + left_s + UNDO_GRACE_S)
        for key in self._healer.backoff.forget_quiet(now):
            self._log.info("drift_contest_ended", what=str(key))
        next_s = self._healer.backoff.next_s(now)
        if next_s is not None and (look.held or look.failed or look.delays):
            self._timers.earliest(self._look, next_s)
        elif look.failed or look.done or look.switched:
            self._timers.set(self._confirm, now + CONFIRM_S)
        if look.plan is not None:
            self._routes.follow(interest_of(look.plan))
            self._follow_gateways(look.plan, look.state)

    def _status(self) -> str:
        stats = self._stats
        if not stats.generation:
            return "no policy is in force"
        text = f"generation {stats.generation}, {len(stats.networks)} network(s)"
        if stats.waiting:
            text += f", waiting for devices: {', '.join(sorted(stats.waiting))}"
        if stats.policy_rejected or stats.apply_failed:
            text += ", the policy files are not in force: see the log"
        return text


def interest_of(plan: Plan) -> Interest:
    """What the daemon listens for."""
    # What a routing daemon does in its table, or in a VRF's, is its own affair, and it may do it a thousand times a
    # second. Our own routes there are known by their protocol.
    theirs = {*plan.external_tables, *(vrf.table for vrf in plan.vrfs)}
    tables = {route.table for route in plan.routes} - theirs
    parents = {link.parent for link in plan.links}
    flowtables = plan.table.flowtables if plan.table else ()
    devices = needed_devices(plan) | parents | set(plan.steering.devices)
    devices |= {name for flowtable in flowtables for name in flowtable.devices}
    follows_default = bool(plan.steering.networks or flowtables)
    return Interest(devices, frozenset(tables), default_routes=follows_default)


def run_service(policy: Path, drop_ins: Path | None, state: Path, metrics: str | None) -> None:
    """Run the daemon in this process until it is told to stop.

    Raises:
        DatapathError: it cannot start.
    """
    stats = ServiceStats()
    stop: Callable[[], None] = lambda: None  # noqa: E731
    if metrics is not None:
        # prometheus-client costs memory that a daemon without metrics need not have.
        from datapath.service.metrics_server import start_metrics  # noqa: PLC0415

        stop = start_metrics(metrics, stats).shutdown
    try:
        Service(StateDirectory(state), PolicyFiles(policy, drop_ins), stats).run()
    finally:
        stop()
