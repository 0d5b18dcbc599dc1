# SPDX-License-Identifier: Apache-2.0
"""From 128 new devices on, filters serve them, in one batch: tcx would take minutes, with everybody waiting."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from datapath.kernel import bpf, ingress, tc
from datapath.kernel.executor import Executor
from datapath.plan.ingress import IngressNetwork, IngressPoint, IngressProgram, VlanProtocol
from datapath.plan.model import Backend, Plan
from datapath.plan.tc import MANY_DEVICES, Direction, Hook
from datapath.reconcile.actual import Actual, ActualLink, Record
from datapath.reconcile.diff import reconcile
from datapath.reconcile.steps import SyncIngress
from tests.bpf.attaching import MASK, add_classic, chain, dump, program, use_hook
from tests.bpf.conftest import run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

pytestmark = [pytest.mark.root, pytest.mark.bpf]


@pytest.fixture(
    params=[
        pytest.param(Hook.TCX, marks=pytest.mark.kernel_feature("tcx")),
        pytest.param(Hook.CLSACT, marks=pytest.mark.kernel_feature("cls_bpf")),
    ]
)
def hook(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hook:
    """Filters are batched where there is no tcx, too."""
    use_hook(monkeypatch, request.param)
    return Hook(request.param)


@pytest.fixture
def many() -> Iterator[tuple[str, ...]]:
    """As many devices as get filters instead of tcx."""
    names = tuple(f"many{number}" for number in range(MANY_DEVICES))
    commands = [f"link add {a} type veth peer name {b}" for a, b in zip(names[::2], names[1::2], strict=True)]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands) + "\n", text=True, check=True)
    yield names
    commands = [f"link del {name}" for name in names[::2]]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(commands) + "\n", text=True, check=True)


def _untagged(*names: str, fwmark: int = 0x0100) -> IngressProgram:
    return program(
        *(
            IngressNetwork(
                name=name,
                slot=slot,
                fwmark=fwmark,
                point=IngressPoint(name, VlanProtocol.UNTAGGED, 0),
                device=name,
            )
            for slot, name in enumerate(names, start=1)
        )
    )


def _sync(desired: IngressProgram) -> bool:
    """What reconciliation makes of it, carried out; whether there was anything to do."""
    with Executor() as executor:
        links = {name: ActualLink(name, up=True) for name in tc.ifindexes()}
        actual = Actual(ingress=ingress.observe(desired), links=links)
        changes = reconcile(actual, Plan(MASK, ingress=desired, backend=Backend.EBPF), Record())
        steps = [step for step in changes.steps if isinstance(step, SyncIngress)]
        for step in steps:
            executor.run(step)
    return bool(steps)


def _filters(names: Iterable[str]) -> set[str]:
    by_index = {index: name for name, index in tc.ifindexes().items()}
    state = tc.observe_our_place(Direction.INGRESS)
    return {by_index[found.ifindex] for found in state.filters if found.is_ours} & set(names)


@pytest.mark.usefixtures("wire")
def test_many_new_devices_get_filters_and_keep_them(many: tuple[str, ...], hook: Hook) -> None:
    """New tcx programs take 20 ms each, with everybody waiting; what serves already is not touched."""
    assert _sync(_untagged(*many))
    assert _filters(many) == set(many)
    assert not any(chain(name) for name in many)
    assert not _sync(_untagged(*many))

    # One more is not many; the others stay as they are.
    assert _sync(_untagged(*many, "trunk0"))
    (program_id,) = bpf.observe_ingress().programs
    assert chain("trunk0") == ((program_id,) if hook is Hook.TCX else ())
    assert _filters(many) == set(many)
    assert not _sync(_untagged(*many, "trunk0"))

    # Another program (the mask is compiled in) replaces each where it is.
    other = IngressProgram(fwmark_mask=0xFF0000, networks=_untagged(*many, "trunk0", fwmark=0x10000).networks)
    assert _sync(other)
    (replaced,) = bpf.observe_ingress().programs
    assert replaced != program_id
    assert set(bpf.observe_ingress().attached.values()) == {replaced}
    assert _filters(many) == set(many)
    assert chain("trunk0") == ((replaced,) if hook is Hook.TCX else ())

    # A filter that somebody took away comes back, by tcx where it is the only one.
    run("tc", "qdisc", "del", "dev", many[5], "clsact")
    assert _sync(other)
    assert not _sync(other)

    # Fewer than many are served by tcx, as ever.
    few = IngressProgram(fwmark_mask=0xFF0000, networks=other.networks[:3])
    assert _sync(few)
    assert _sync(few) is (hook is Hook.TCX)  # few filters look as if an older version had left them
    assert not _sync(few)
    assert all(bool(chain(name)) is (hook is Hook.TCX) for name in many[:3])
    assert _filters(many) == (set() if hook is Hook.TCX else set(many[:3]))
    tc.remove_clsact(*many[:3])
    assert _sync(IngressProgram(fwmark_mask=0xFF0000))
    tc.remove_clsact(*many, "trunk0")
    assert not tc.observe_our_place(Direction.INGRESS).clsact


@pytest.mark.kernel_feature("tcx")
@pytest.mark.usefixtures("wire")
def test_foreign_filter_among_many_devices_is_passed_over_with_tcx(
    many: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_hook(monkeypatch, Hook.TCX)
    run("tc", "qdisc", "add", "dev", many[7], "clsact")
    add_classic(many[7], "ingress", priority=tc.TC_PRIORITY)
    before = dump(many[7])
    assert _sync(_untagged(*many, "trunk0"))
    assert chain(many[7])
    assert _filters(many) == set(many) - {many[7]}
    assert not _sync(_untagged(*many, "trunk0"))
    assert _sync(program())
    tc.remove_clsact(*many, "trunk0")  # not the one that somebody uses
    assert dump(many[7]) == before
