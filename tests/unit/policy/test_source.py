# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from datapath.errors import PolicyError, Problem
from datapath.policy import parse_policy
from datapath.policy.loader import FILE_BYTES_MAX
from datapath.policy.source import RENDERED_MAX, PlacedProblem, PolicySource, Position

TEXT = b"""version: 1
networks:
  - name: a
    interface: eth1
    vips: [192.0.2.0/24]
    gateway: 192.0.2.1
"""


@pytest.fixture
def source() -> PolicySource:
    return parse_policy(TEXT, "p.yaml").source


def test_positions(source: PolicySource) -> None:
    assert source.locate(()) == (1, 1)
    assert source.locate(("networks", 0, "vips", 0)) == Position(5, 12)
    assert source.locate(("networks", 0, "vips"), on_key=True) == Position(5, 5)
    assert source.line_of(("networks", 0, "gateway")) == 6


def test_what_is_not_in_the_file_is_at_its_nearest_parent(source: PolicySource) -> None:
    assert source.locate(("networks", 0, "gateway", 0)) == Position(6, 14)
    assert source.locate(("networks", 0, "mark")) == Position(3, 5)
    assert source.locate(("networks", 0, "mark"), on_key=True) == Position(3, 5)
    assert source.locate(("networks", 7, "mark", "x")) == Position(3, 3)
    assert source.locate(("marks", "mask")) == Position(1, 1)


def test_later_problems_are_rendered_in_file_order(source: PolicySource) -> None:
    late = Problem(("networks", 0, "gateway", 0), "nobody answers", "plug it in")
    early = Problem(("networks", 0, "interface"), "no such device", on_key=True)
    error = source.error([late, early, late])
    assert error.problems == (early, late)
    assert error.rendered == (
        "p.yaml:4:5: error: networks[0].interface: no such device\n"
        "      interface: eth1\n"
        "      ^\n"
        "p.yaml:6:14: error: networks[0].gateway: nobody answers\n"
        "      gateway: 192.0.2.1\n"
        "               ^\n"
        "hint: plug it in"
    )


def test_control_characters_of_names_and_messages_are_escaped() -> None:
    source = PolicySource("a\x1b[31m.yaml", "x: \x07\u202ey\n")
    text = source.render([Problem((), "bad \x1b]0;\x07 and \r\n too", "hint\x00")])
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "a\\x1b[31m.yaml:1:1" in text


def test_many_problems_are_counted() -> None:
    source = PolicySource("p", "")
    problems = [Problem((), f"number {n}") for n in range(RENDERED_MAX + 5)]
    error = source.error(problems)
    assert len(error.problems) == RENDERED_MAX + 5
    assert error.rendered.endswith("p: 5 more problems are not shown")
    assert error.rendered.count("error:") == RENDERED_MAX


@pytest.mark.parametrize("column", [1, 61, 400, 799, 800])
def test_caret_is_below_its_column_in_a_long_line(column: int) -> None:
    line = "".join(chr(ord("a") + n % 26) for n in range(800))
    source = PolicySource("p", line)
    error = source.error([_placed(column)])
    _, text, caret, *_ = error.rendered.split("\n")
    assert len(text) < 140
    assert text[caret.index("^")] == line[column - 1]


def _placed(column: int) -> Problem:
    return PlacedProblem((), "here", position=Position(1, column))


def test_file_that_is_too_large() -> None:
    with pytest.raises(PolicyError, match="larger than 4 MiB"):
        parse_policy(b"#" * (FILE_BYTES_MAX + 1), "p")
    with pytest.raises(PolicyError, match="empty"):
        parse_policy(b"#" * FILE_BYTES_MAX, "p")


def test_too_many_networks() -> None:
    text = "version: 1\nnetworks:\n" + "  - {name: a, interface: b, vips: [192.0.2.1]}\n" * 4096
    with pytest.raises(PolicyError) as caught:
        parse_policy(text.encode(), "p")
    assert any(p.path == ("networks",) and "more than 4095" in p.message for p in caught.value.problems)


@pytest.mark.parametrize(
    "vips",
    ["x, " * 260_000, "1.1.1.1, " * 260_000],
)
def test_too_many_values_are_one_problem(vips: str) -> None:
    text = f"version: 1\nnetworks: [{{name: a, interface: b, vips: [{vips}]}}]\n"
    with pytest.raises(PolicyError, match="more than 250000 values") as caught:
        parse_policy(text.encode(), "p")
    assert len(caught.value.problems) == 1


def test_a_misspelt_key_counts_as_the_one_that_was_meant() -> None:
    text = TEXT.replace(b"192.0.2.0/24", b"192.0.2.7") + b"    on_lnik: [192.0.2.0/24]\n"
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p")
    assert [p.path for p in caught.value.problems] == [("networks", 0, "on_lnik")]
