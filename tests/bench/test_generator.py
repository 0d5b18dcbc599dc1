# SPDX-License-Identifier: Apache-2.0
"""The generator on the real kernel: every frame is counted where it must arrive, and a broken path is seen as one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tools.bench import frames, variants
from tools.bench.forwarding import Arrivals, Cell, Runner, expected
from tools.bench.frames import Place
from tools.bench.ground import Ground, Site, default_by, site
from tools.bench.programs import Programs, loaded
from tools.bench.variants import BASE
from tools.lab.netns import leftovers
from tools.lab.topology import FAMILIES

pytestmark = [pytest.mark.root, pytest.mark.bpf]

PACKETS = 600


@pytest.fixture(scope="module")
def programs() -> Iterator[Programs]:
    with loaded() as made:
        yield made


@pytest.fixture(scope="module")
def built(programs: Programs) -> Iterator[Site]:
    with site(programs) as made:
        yield made
    assert not [name for name in leftovers() if name.startswith(made.around.name.partition("-")[0])]


@pytest.fixture
def base(built: Site) -> Ground:
    ground = built.ground(1, all_devices=True)
    variants.by_name(BASE).install(ground)
    return ground


def cell(name: str, letter: str, family: int = 4) -> Cell:
    return Cell(variants.by_name(name), 1, family, frames.PROFILES[letter])


def arrivals(programs: Programs, ground: Ground, wanted: Cell) -> Arrivals:
    _, arrived, _ = Runner(programs).run(ground, wanted, PACKETS, 64)
    return arrived


@pytest.mark.parametrize("family", FAMILIES)
def test_all_frames_arrive_where_they_must(programs: Programs, base: Ground, family: int) -> None:
    for letter, profile in frames.PROFILES.items():
        if profile.with_dnat:
            variants.install_dnat(base)
        arrived = arrivals(programs, base, cell(BASE, letter, family))
        assert arrived == expected(variants.by_name(BASE), profile, family, PACKETS), letter
        assert arrived.at(profile.arrives) == PACKETS


def test_flows_are_as_many_as_promised(programs: Programs, base: Ground) -> None:
    arrivals(programs, base, cell(BASE, "o"))
    assert base.node.run("conntrack", "-C").strip() == str(frames.FEW_FLOWS)
    arrivals(programs, base, cell(BASE, "n"))
    assert base.node.run("conntrack", "-C").strip() == str(PACKETS)


def test_a_lost_frame_voids_the_figure(programs: Programs, base: Ground) -> None:
    base.around.ip([f"link set {base.pod.far} down"])
    broken = cell(BASE, "r")
    Runner(programs).measure(base, broken)
    assert broken.problem.startswith("of 256 frames arrived: none")
    assert not broken.samples


def test_a_few_lost_frames_void_the_figure(programs: Programs, base: Ground) -> None:
    base.node.nft(
        "table inet lossy { chain c { type filter hook forward priority 0; numgen inc mod 100 == 7 drop; }; }"
    )
    broken = cell(BASE, "o")
    Runner(programs).measure(base, broken)
    assert "arrived: pod 253" in broken.problem or "arrived: pod 254" in broken.problem


def test_replies_by_the_default_route_are_misrouted(programs: Programs, built: Site) -> None:
    ground = built.ground(1, all_devices=True)
    default_by(ground, "default")
    wrong = cell("plain", "r")
    Runner(programs).measure(ground, wrong)
    assert wrong.problem == "misrouted: 256 of 256 left by the default route"


def test_a_policy_that_lets_spoofed_frames_in_has_no_figure(programs: Programs, base: Ground) -> None:
    wrong = cell("classic-nft", "s")
    Runner(programs).measure(base, wrong)
    assert "pod 256; expected: none" in wrong.problem


@pytest.mark.parametrize("name", ["ebpf-rules", "nft-rules"])
def test_ours_serves_every_profile(programs: Programs, built: Site, name: str) -> None:
    ground = built.ground(3, all_devices=True)
    variant = variants.by_name(name)
    variant.install(ground)
    variants.install_dnat(ground)
    for letter in frames.PROFILES:
        for family in FAMILIES:
            one = Cell(variant, 3, family, frames.PROFILES[letter])
            Runner(programs).measure(ground, one)
            assert one.problem == "", (letter, family)
            assert one.samples[0] > 100
            assert frames.PROFILES[letter].is_spoofed is (
                expected(variant, one.profile, family, 1).at(Place.POD) == 0
            ) or (one.profile.is_echo)
