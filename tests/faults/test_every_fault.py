# SPDX-License-Identifier: Apache-2.0
"""Every point of every kind of change: refused with every error, refused or killed again on the way back, killed.

On the fake kernel, which refuses what the kernel refuses (tests/faults/test_fake_kernel.py). test_refusals.py and
test_crash.py do the same on the running kernel, with samples. Here, too, two things are sampled, because the product
is large: of the pairs of a first point and a second one on the way back, every fifth (which fifth moves with the
first point), refused and killed in turn; and what comes after a kill, of which each point tries two of the six.
What a second pass deletes and writes is met at every point of the way back (`test_second_pass`).
"""

from __future__ import annotations

import errno

import pytest

from datapath.plan.tc import Hook
from tests.fake_kernel.site import Killed, Site, attempt, countless, points_of, refusal
from tests.faults.errnos import ERRNOS

pytestmark = pytest.mark.slow

#: Kinds of change: from, to. The way to `none` is teardown.
CHANGES = (
    ("none", "two"),
    ("one", "two"),
    ("two", "one"),
    ("two", "vlan"),
    ("vlan", "two"),
    ("vlan", "other vlan"),
    ("two", "gateway"),
    ("two", "vips"),
    ("two", "one family"),
    ("two", "no gateway"),
    ("two", "mode"),
    ("two", "track"),
    ("two", "mark"),
    ("two", "isolated"),
    ("isolated", "zone"),
    ("isolated", "two"),
    ("two", "table"),
    ("two", "arp"),
    ("two", "mask"),
    ("two", "priority"),
    ("two", "none"),
    ("vlan", "none"),
    ("two", "accelerate vlan"),
    ("accelerate vlan", "accelerate"),
    ("accelerate vlan", "none"),
    ("two", "vrf"),
    ("vrf", "other vrf"),
    ("vrf", "two"),
    ("vrf", "none"),
)
#: These pin an id. One that the policy before does not pin stays what it is, once half of the new one is there.
PINNED = ("mark", "table", "zone")
#: What looks at packets, and how the kernel takes the program.
EBPF, EBPF_CLSACT, NFT = ("ebpf", Hook.TCX), ("ebpf", Hook.CLSACT), ("nft", Hook.TCX)
#: Policy and backend before, policy and backend after, hook.
CASES = [
    pytest.param((old, backend), (new, backend), hook, id=f"{old}-{new}-{backend}-{hook}")
    for backend, hook in (EBPF, NFT, EBPF_CLSACT)
    for old, new in (CHANGES if hook is Hook.TCX else CHANGES[:5])
] + [
    pytest.param(("two", old), ("two", new), hook, id=f"two-two-{old}-{new}-{hook}")
    for old, new in (("ebpf", "nft"), ("nft", "ebpf"))
    for hook in Hook
]
Policy = tuple[str, str]
#: What may come after a kill, besides the next apply.
DAEMON, RESTARTED, ROLLBACK = "look of a daemon", "start of a daemon with the new file", "rollback 1"


def proceed(site: Site, target: Policy, new: Policy) -> None:
    """What comes after a kill."""
    verb = target[0]
    if verb == ROLLBACK:
        site.controller.rollback(1)
    elif verb == RESTARTED:
        if new[0] == "none":
            site.apply(*new)
        else:
            site.start_daemon(*new)
    elif verb == DAEMON:
        look = site.look()
        assert not look.failed
        assert not look.held
    else:
        site.apply(*target)


@pytest.mark.parametrize(("old", "new", "hook"), CASES)
def test_refused_once(site: Site, old: Policy, new: Policy, hook: Hook) -> None:
    """Rolled back to exactly the state before, or completed; the error names the point and the reason.

    A teardown is not rolled back: what was put back already is right. It can be repeated.
    """
    site.begin(*old, hook)
    before = site.kernel.snapshot()
    names = points_of(lambda: site.apply(*new))
    after = site.kernel.snapshot()
    is_teardown = new[0] == "none"
    refused = 0
    for number, name in enumerate(names):
        for code in ERRNOS:
            where = f"{name}: {errno.errorcode[code]}"
            site.again()
            error = attempt(lambda: site.apply(*new), {number: refusal(code)})
            if error is None:
                assert not site.differences(after), where
                continue
            refused += 1
            assert countless(name) in countless(str(error)), where
            assert errno.errorcode[code] in str(error), where
            if not is_teardown:
                assert not site.differences(before), where
        finish, expected = (new, after) if is_teardown else (old, before)
        assert not site.apply(*finish) or is_teardown, f"{name}: nothing is left to do"
        assert not site.differences(expected), name
    assert refused > len(names) * len(ERRNOS) // 2
    assert len(names) > 5


@pytest.mark.parametrize(("old", "new", "hook"), CASES)
def test_faults_while_going_back(site: Site, old: Policy, new: Policy, hook: Hook) -> None:
    """The way back is refused, too, or killed: the next apply of either policy cleans up."""
    site.begin(*old, hook)
    before = site.kernel.snapshot()
    names = points_of(lambda: site.apply(*new))
    after = site.kernel.snapshot()
    for first, name in enumerate(names):
        for second in range(first + 1 + first % 5, first + 1 + len(names), 5):
            site.again()
            again = refusal(errno.ENOMEM) if (first + second) % 2 else Killed
            if attempt(lambda: site.apply(*new), {first: refusal(errno.ENOMEM), second: again}) is None:
                continue
            target, expected = (new, after) if second % 4 > 1 or new[0] in PINNED else (old, before)
            site.apply(*target)
            assert not site.differences(expected), f"{name}, then number {second}"


@pytest.mark.parametrize(
    ("old", "new"), [change for change in CHANGES if change[1] in {"two", "vlan", "other vlan", "one"}]
)
def test_second_pass(site: Site, old: str, new: str) -> None:
    """Somebody undoes a part of the change while it is carried out, so that it takes two passes."""
    site.begin("none", "nft")
    bare = site.kernel.snapshot()
    site.begin(old, "ebpf")
    before = site.kernel.snapshot()
    plain = len(points_of(lambda: site.apply(new, "ebpf")))
    site.again_meddled()
    names = points_of(lambda: site.apply(new, "ebpf"))
    after = site.kernel.snapshot()
    assert len(names) > plain, "a second pass"
    targets = ((old, before), (new, after), ("none", bare))
    for first in range(plain - 4, len(names)):
        for second in range(first + 1, first + 1 + len(names)):
            site.again_meddled()
            again = refusal(errno.ENOMEM) if (first + second) % 2 else Killed
            attempt(lambda: site.apply(new, "ebpf"), {first: refusal(errno.ENOMEM), second: again})
            target, expected = targets[second % 3]
            site.apply(target, "ebpf")
            assert not site.differences(expected), f"{names[first]}, then number {second}, then {target}"


@pytest.mark.parametrize(("old", "new", "hook"), CASES)
def test_killed(site: Site, old: Policy, new: Policy, hook: Hook) -> None:
    """Killed at any point, whatever comes next leaves exactly its own state."""
    site.begin("none", "nft", hook)
    bare = site.kernel.snapshot()
    site.begin(*old, hook)
    before = site.kernel.snapshot()
    names = points_of(lambda: site.apply(*new))
    after = site.kernel.snapshot()
    is_moved = new[0] in PINNED
    for number, name in enumerate(names):
        # Ids that a policy does not pin stay what they are: half of the new policy may be in force already.
        unmoved = (old, before) if not is_moved else (new, after)
        targets = [(new, after), unmoved, (("none", ""), bare), ((DAEMON, ""), {}), ((RESTARTED, ""), after)]
        if old[0] != "none":
            targets.append(((ROLLBACK, ""), {} if is_moved else before))
        for turn in (number, number + 3):
            target, expected = targets[turn % len(targets)]
            where = f"killed before {name}, then {target[0]}"
            site.again()
            assert isinstance(attempt(lambda: site.apply(*new), {number: Killed}), Killed)
            proceed(site, target, new)
            if target[0] == DAEMON and old[0] != "none" and not is_moved:
                expected = before if site.directory.load().policy_name == f"{old[0]}.yaml" else after
            assert not site.differences(expected or site.kernel.snapshot()), where
            drift = site.controller.status()
            assert drift is None or not drift.steps, where
