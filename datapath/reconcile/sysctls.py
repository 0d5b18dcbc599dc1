# SPDX-License-Identifier: Apache-2.0
"""Sysctl changes: what must be loosened first, what is tightened last, and what is put back.

The kernel's effective `rp_filter` is max(all, device), so exempting one device needs `all` = 0. Every
other device, and `default` for devices to come, first gets its present effective value as its own, so
that no device but ours is checked less for a moment.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from datapath.plan.rtnl import Sysctl
from datapath.reconcile.actual import Record, Saved
from datapath.reconcile.steps import SetSysctl

_RP_FILTER = re.compile(r"net/ipv4/conf/(?P<device>[^/]+)/rp_filter\Z")

_DEVICE = re.compile(r"net/ipv[46]/conf/(?P<device>[^/]+)/")
_DEFAULT = re.compile(r"net/(?P<family>ipv[46])/conf/default/(?P<name>.+)\Z")


def rp_filter_key(device: str) -> str:
    """Key of a device's own rp_filter; `all` and `default` are devices here."""
    return f"net/ipv4/conf/{device}/rp_filter"


ALL = rp_filter_key("all")


@dataclass(frozen=True, slots=True)
class SysctlChanges:
    """Steps by phase, and the record as it is to be written before any of them.

    Attributes:
        loosen: before everything else.
        tighten: after everything else.
        saved: originals of all keys that are ours once this is done, or may be while it is being done.
        released: keys that are no longer ours after `tighten`.
    """

    loosen: tuple[SetSysctl, ...]
    tighten: tuple[SetSysctl, ...]
    saved: Mapping[str, Saved]
    released: frozenset[str]


def diff_sysctls(
    actual: Mapping[str, str], settings: Iterable[Sysctl], exempt: Iterable[str], record: Record
) -> SysctlChanges:
    """Changes from the present values to the desired ones.

    Args:
        actual: present values; all `rp_filter` keys and all keys of `settings` and of the record that exist.
        settings: plain settings of the plan.
        exempt: devices whose rp_filter must be off.
        record: what we changed before.
    """
    saved = _refreshed(record.sysctls, actual)
    exempt = frozenset(exempt)
    wanted = {setting.key: setting.value for setting in settings}
    wanted |= dict(_exempt_values(actual, exempt, saved))
    changed = [
        SetSysctl(key, value, actual[key])
        for key, value in sorted(wanted.items(), key=_loosening_order)
        if key in actual and actual[key] != value
    ]
    loosen = [step for step in changed if not _leaves(step, actual)]
    leaving = [step for step in changed if _leaves(step, actual)]
    # A device that is exempt must be known as such when it no longer is, even if its own value was 0 before.
    exempt_keys = {rp_filter_key(device) for device in exempt}
    for key, value in wanted.items():
        if key in actual and (key in saved or actual[key] != value or key in exempt_keys):
            saved[key] = _saved(saved.get(key), actual[key], value)
    released = frozenset(key for key in saved if key not in wanted)
    tighten = [
        SetSysctl(key, saved[key].original, actual[key])
        for key in sorted(released, key=lambda key: (key != ALL, key))
        if key in actual and actual[key] in _ours(saved[key]) and actual[key] != saved[key].original
    ]
    return SysctlChanges(tuple(loosen), (*leaving, *tighten), saved, released)


def _leaves(step: SetSysctl, actual: Mapping[str, str]) -> bool:
    """The check of a device comes back that was exempt until now, while others stay exempt.

    It drops what the old policy still serves there, so it comes last. Where somebody has set `all` again, the device
    is checked at this moment and must stay so when `all` goes.
    """
    return (
        _RP_FILTER.match(step.key) is not None
        and step.key != ALL
        and step.old == "0"
        and actual.get(ALL, "0") == "0"
    )


class Caution:
    """For who goes on after a refusal: no device is checked less because a step before was not carried out.

    Effective is the higher of `all` and a device's own `rp_filter`. Where one of the two could not be raised, the
    other must not be lowered; it would look as if somebody else had set it so, and stay for ever.
    """

    def __init__(self) -> None:
        self._is_one_too_low = False

    def not_done(self, step: object) -> None:
        """The step was refused, or put off."""
        self._is_one_too_low |= _direction(step) > 0

    def forbids(self, step: object) -> bool:
        """Whether the step must wait until those before it could be carried out."""
        return self._is_one_too_low and _direction(step) < 0


def _direction(step: object) -> int:
    """How much more an rp_filter checks after the step; 0 for all other steps."""
    if not isinstance(step, SetSysctl) or _RP_FILTER.match(step.key) is None:
        return 0
    return int(step.new) - int(step.old)


def inherited(actual: Mapping[str, str], devices: Iterable[str]) -> dict[str, str]:
    """What devices that do not exist yet will start with: the values of `default`."""
    defaults = {
        (match["family"], match["name"]): value
        for key, value in actual.items()
        if (match := _DEFAULT.match(key)) is not None
    }
    return {
        f"net/{family}/conf/{device}/{name}": value
        for device in devices
        for (family, name), value in defaults.items()
    }


def split_by_device(
    steps: Iterable[SetSysctl], devices: frozenset[str]
) -> tuple[list[SetSysctl], list[SetSysctl]]:
    """Steps that touch none of the devices, and those that do."""
    rest: list[SetSysctl] = []
    theirs: list[SetSysctl] = []
    for step in steps:
        match = _DEVICE.match(step.key)
        (theirs if match and match["device"] in devices else rest).append(step)
    return rest, theirs


def _saved(entry: Saved | None, present: str, wanted: str) -> Saved:
    """What to remember of a key before it is written.

    From one value of ours to another, both are ours until it is done: a process that dies between this record and
    the write must not leave a value that looks like somebody else's. None of these values holds a space.
    """
    if entry is None:
        return Saved(present, wanted)
    between = present != wanted and present in _ours(entry)
    return Saved(entry.original, f"{present} {wanted}" if between else wanted)


def _ours(entry: Saved) -> list[str]:
    return entry.ours.split()


def _refreshed(saved: Mapping[str, Saved], actual: Mapping[str, str]) -> dict[str, Saved]:
    """Somebody else's later value is the one to put back, not the older one that we found."""
    return {
        key: entry
        if key not in actual or actual[key] in (*_ours(entry), entry.original)
        else Saved(actual[key], entry.ours)
        for key, entry in saved.items()
    }


def _exempt_values(
    actual: Mapping[str, str], exempt: frozenset[str], saved: Mapping[str, Saved]
) -> Iterator[tuple[str, str]]:
    """Desired rp_filter values of all devices; none where no device is exempt."""
    if not exempt:
        return
    everywhere = int(actual.get(ALL, "0"))
    for key, value in actual.items():
        match = _RP_FILTER.match(key)
        if match is None:
            continue
        if key == ALL or match["device"] in exempt:
            yield key, "0"
        elif key in saved and value == "0" and "0" in _ours(saved[key]):
            # It was exempt until now: back to what the kernel would check without us.
            original_all = int(saved[ALL].original) if ALL in saved else everywhere
            yield key, str(max(original_all, int(saved[key].original), everywhere))
        elif (key in saved and value != "0") or int(value) < everywhere:
            # A 0 that is not ours was set by somebody since: theirs to keep.
            yield key, str(max(everywhere, int(value)))
    for device in exempt:
        yield rp_filter_key(device), "0"


def _loosening_order(item: tuple[str, str]) -> tuple[int, str]:
    """Everybody's own value first, `all` after it, our devices last."""
    key, value = item
    if key == ALL:
        return 1, key
    is_exempt = _RP_FILTER.match(key) is not None and value == "0"
    return 2 if is_exempt else 0, key
