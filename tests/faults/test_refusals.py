# SPDX-License-Identifier: Apache-2.0
"""Every kernel operation is refused once: the apply says which one, everything is as before, and nothing is left over.

What could be left over: eBPF programs and maps, counted by their ids, qdiscs and file descriptors.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.kernel.bpf import attachments
from tests.faults.errnos import ERRNOS
from tests.faults.leaks import objects_with_mask
from tests.faults.zygote import Zygote
from tests.netns.nodes import Node, inside, node, quick_dump
from tests.service.daemon import wait_until
from tools.lab.dump import difference, dump_namespace

pytestmark = [pytest.mark.root, pytest.mark.bpf, pytest.mark.slow]

#: Nobody else's, nor this file's in another worker: what we leave is told by it from what others have there.
MASK = 0x03FC0000 >> int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
OLD = """\
version: 1
backend: {backend}
marks: {{mask: {mask:#010x}}}
networks:
  - {{name: a, interface: eth1, vips: [10.1.0.0/24], gateway: 10.1.0.1}}
"""
NEW = """\
version: 1
backend: {backend}
marks: {{mask: {mask:#010x}}}
networks:
  - {{name: a, interface: eth1, vips: [10.1.0.0/24, "2001:db8:1::/64"], gateway: [10.1.0.2, "2001:db8:1::1"]}}
  - {{name: b, interface: eth2, vips: [10.2.0.0/24], gateway: 10.2.0.1, strict_arp: true}}
"""


@pytest.fixture(scope="module")
def bare() -> Iterator[Node]:
    with node(4) as built:
        yield built


@pytest.fixture(scope="module", params=["auto", "clsact"])
def zygote(bare: Node, request: pytest.FixtureRequest) -> Iterator[Zygote]:
    """With the hook that the kernel has, and with a qdisc, which is more to leave behind."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "auto":
            patch.setenv(attachments.ENVIRONMENT, request.param)
        with Zygote(bare.namespace) as running:
            yield running


def write(folder: Path, name: str, text: str, backend: str) -> str:
    path = folder / name
    path.write_text(text.format(backend=backend, mask=MASK))
    return str(path)


def look(bare: Node) -> dict[str, str]:
    """The node as far as we may have changed it, without a process for each part."""
    with inside(bare.namespace.name):
        sections = quick_dump(["eth1", "eth2"])
    # A program that was loaded again has another id; the full dump at the end compares filters without it.
    return {name: text for name, text in sections.items() if name != "filters"}


@pytest.mark.parametrize("backend", ["ebpf", "nft"])
def test_refused_at_every_point(bare: Node, zygote: Zygote, tmp_path: Path, backend: str) -> None:
    state = tmp_path / "state"
    old, new = write(tmp_path, "old", OLD, backend), write(tmp_path, "new", NEW, backend)
    assert not zygote.ask("apply", state, policy=old)["error"]
    before, quick, objects = dump_namespace(bare.namespace), look(bare), objects_with_mask(MASK)
    assert objects["programs"] == objects["descriptions"] == (1 if backend == "ebpf" else 0)
    whole = zygote.ask("apply", state, policy=new)
    assert not whole["error"]
    names = whole["points"]
    assert len(names) > 15
    assert not zygote.ask("apply", state, policy=old)["error"]
    assert difference(before, dump_namespace(bare.namespace)) == ""
    tried = 0
    for number, name in enumerate(names):
        # All errnos at every point would be seven times this; the engine never looks at them, so they take turns.
        code = ERRNOS[number % len(ERRNOS)]
        answer = zygote.ask("apply", state, policy=new, fail_at=number, errno=code)
        if answer["error"]:
            tried += 1
            assert errno.errorcode[code] in answer["error"], answer["error"]
            assert re.sub(r"\d{6}", "N", name) in re.sub(r"\d{6}", "N", answer["error"]), answer["error"]
        assert answer["fds"] == 0, f"refused: {name}"
        if answer["error"]:
            # A program whose filter is gone is freed after a grace period of RCU.
            wait_until(lambda: objects_with_mask(MASK) == objects, f"nothing more is held, refused: {name}")
        left = zygote.ask("apply", state, policy=old)
        assert not left["error"], f"refused: {name}: {left['error']}"
        assert not answer["error"] or not left["changed"], f"refused: {name}: the rollback left something"
        assert difference(quick, look(bare)) == "", f"refused: {name}"
    assert difference(before, dump_namespace(bare.namespace)) == ""
    assert tried > len(names) // 2
    assert not zygote.ask("teardown", state)["error"]
    wait_until(lambda: set(objects_with_mask(MASK).values()) == {0}, "no program and no map is left")
    assert "clsact" not in bare.run("tc", "qdisc", "show")
