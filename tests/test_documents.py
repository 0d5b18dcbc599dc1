# SPDX-License-Identifier: Apache-2.0
"""Links between documents lead somewhere, and pictures are there."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final
from xml.etree import ElementTree as ET

import pytest

from tests.sources import REPOSITORY, files_with_suffix

if TYPE_CHECKING:
    from collections.abc import Iterator

_LINK: Final = re.compile(
    r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*\bsrc=\"([^\"]+)\"|<a[^>]*\bhref=\"([^\"]+)\""
)
_CODE: Final = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def _prose(page: Path) -> str:
    return _CODE.sub("", (REPOSITORY / page).read_text(encoding="utf-8"))


@functools.cache
def _anchors(page: Path) -> frozenset[str]:
    """The anchors that the usual renderers make of headings."""
    headings = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", _prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return frozenset(re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain)


def _broken_links(page: Path) -> Iterator[str]:
    for match in _LINK.finditer(_prose(page)):
        link = next(group for group in match.groups() if group)
        if re.match(r"(https?|mailto):", link):
            continue
        name, _, anchor = link.partition("#")
        target = (REPOSITORY / page.parent / name).resolve() if name else REPOSITORY / page
        if not target.is_relative_to(REPOSITORY) or not target.exists():
            yield f"{page}: {link}: no such file"
        elif anchor and target.suffix == ".md" and anchor not in _anchors(target.relative_to(REPOSITORY)):
            yield f"{page}: {link}: no such heading"


def test_links_lead_somewhere() -> None:
    pages = files_with_suffix(".md")
    assert Path("README.md") in pages
    broken = [problem for page in pages for problem in _broken_links(page)]
    assert not broken, "\n".join(broken)


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    queue = [Path("README.md")]
    while queue:
        page = queue.pop()
        reached.add(page)
        for match in _LINK.finditer(_prose(page)):
            link = next(group for group in match.groups() if group).partition("#")[0]
            target = (REPOSITORY / page.parent / link).resolve()
            if target.suffix == ".md" and target.is_file():
                relative = target.relative_to(REPOSITORY)
                if relative not in reached:
                    queue.append(relative)
    pages = {page for page in files_with_suffix(".md") if page.parts[0] == "docs" or len(page.parts) == 1}
    assert not sorted(pages - reached), "link these from README.md or docs/README.md"


@pytest.mark.parametrize("picture", files_with_suffix(".svg"), ids=str)
def test_pictures_are_well_formed_and_say_what_they_show(picture: Path) -> None:
    root = ET.fromstring((REPOSITORY / picture).read_text(encoding="utf-8"))  # noqa: S314 - our own file
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    assert (root.findtext(f"{svg}title") or "").strip(), "a title, for readers who cannot see it"
