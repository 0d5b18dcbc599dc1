# SPDX-License-Identifier: Apache-2.0
"""The shipped rulesets: what each case compiles to, byte for byte, and that nft takes it.

After a change that is meant, look at what it does to every case: `python -m tests.golden.test_rulesets --update`,
then `git diff rulesets`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from _pytest.mark import ParameterSet

from datapath import cli
from datapath.kernel.sandbox import check_nft
from tests.sources import REPOSITORY

RULESETS = REPOSITORY / "rulesets"
CASES = sorted(path.name for path in RULESETS.iterdir() if path.is_dir())
#: Name of the expected file, and the format that `datapath compile` prints it in.
OUTPUTS = {"expected.nft": "nft", "expected.plan": "plan"}
NO_TABLE = "# no nftables table is needed\n"


@pytest.fixture(autouse=True)
def log_settings() -> Iterator[None]:
    """The command line sends logs to this test's standard error, which is closed when the next test logs."""
    before = structlog.get_config()
    yield
    structlog.configure(**before)


def arguments(case: str, output: str) -> list[str]:
    folder = RULESETS / case
    policy, facts = str(folder / "policy.yaml"), str(folder / "facts.yaml")
    return ["compile", "--format", output, "--facts", facts, policy]


def expected(case: str, name: str) -> str:
    return (RULESETS / case / name).read_text(encoding="utf-8")


def lines(case: str, noun: str) -> list[str]:
    return [line for line in expected(case, "expected.plan").splitlines() if line.startswith(f"{noun} ")]


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("case", CASES)
def test_compiles_to_the_expected_text(case: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(case, OUTPUTS[name])) == 0
    assert capsys.readouterr().out == expected(case, name)


def _on_kernels_that_can() -> Iterator[ParameterSet]:
    for case in CASES:
        needs = "accelerate: true" in expected(case, "policy.yaml")
        marks = [pytest.mark.kernel_feature("nf_flow_table"), pytest.mark.vm] if needs else []
        yield pytest.param(case, marks=marks)


@pytest.mark.root
@pytest.mark.parametrize("case", [*_on_kernels_that_can()])
def test_nft_and_the_kernel_take_it(case: str) -> None:
    # There are no devices in the check's namespace: which of them a flowtable gets, is decided on the node.
    check_nft(re.sub(r" devices = \{[^}]*\};", "", expected(case, "expected.nft")))


def test_an_accelerated_case_has_all_devices_and_the_marks_of_its_networks() -> None:
    nft = expected("accelerate", "expected.nft")
    assert 'devices = { "cni0", "eth0", "eth0.100" };' in nft
    assert "accelerated { 0x00020000 }" in nft


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_explained(case: str) -> None:
    readme = expected(case, "README.md")
    assert readme.startswith("# ")
    assert len(readme.splitlines()) >= 3
    assert {path.name for path in (RULESETS / case).iterdir()} == {
        "README.md",
        "facts.yaml",
        "policy.yaml",
        *OUTPUTS,
    }


def test_case_1_is_nothing_at_all_and_says_why() -> None:
    assert expected("case-1-own-subnet", "expected.nft") == NO_TABLE
    plan = expected("case-1-own-subnet", "expected.plan").splitlines()
    assert [line for line in plan if not line.startswith(("#", "info:"))] == []
    assert any("own subnet of eth0 (192.168.1.0/24), which the node routes already" in line for line in plan)


def test_case_2_is_one_route_in_main_and_no_mark() -> None:
    assert expected("case-2-on-link", "expected.nft") == NO_TABLE
    case = "case-2-on-link"
    assert lines(case, "route") == ["route -4 10.9.8.0/24 dev eth1 table 254 protocol 78"]
    assert [lines(case, noun) for noun in ("network", "rule", "sysctl", "link", "add", "ingress")] == [[]] * 6


def test_case_3_has_no_mark_and_exempts_the_inside() -> None:
    rules = lines("case-3-source", "rule")
    assert not any("fwmark" in rule for rule in rules)
    assert [rule for rule in rules if "to 10.112.0.0/12 goto 10002" in rule]
    assert "hook" not in expected("case-3-source", "expected.nft")


def test_case_4_restores_only_in_replies() -> None:
    nft = expected("case-4-conntrack", "expected.nft")
    assert all("ct direction reply" in line for line in nft.splitlines() if "goto reply" in line)
    assert all("datapath reply meta" in line for line in nft.splitlines() if "goto restore" in line)
    assert "output { type route hook output" in nft


def test_direct_network_has_no_mark_no_table_and_no_rule() -> None:
    assert lines("direct", "network") == [
        "network partners fwmark 0x00010000 table 700001 slot 1",
        "network public fwmark none table none slot 2",
    ]
    assert not any("eth0.100" in line for line in lines("direct", "route"))
    assert "steering at the egress of eth0" in lines("direct", "steering")


def main() -> int:
    """Write what the cases compile to now."""
    if sys.argv[1:] != ["--update"]:
        sys.stderr.write("usage: python -m tests.golden.test_rulesets --update\n")
        return 2
    for case in CASES:
        for name, output in OUTPUTS.items():
            with Path(RULESETS / case / name).open("w", encoding="utf-8") as file:
                before, sys.stdout = sys.stdout, file
                try:
                    status = cli.main(arguments(case, output))
                finally:
                    sys.stdout = before
            if status:
                return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
