"""The pages of documentation: links lead somewhere, files that are named exist, and the index has every page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "tests").rglob("*.md"))]


def prose(page):
    """A page without its code."""
    return re.sub(r"(?ms)^```.*?^```$|^    .*?$|`[^`\n]*`", "", page.read_text())


def anchors(page):
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page):
    links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", prose(page))
    for link in filter(None, (one or other for one, other in links)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not re.match(r"https?://", link) and (
            not target.exists() or (anchor and anchor not in anchors(target.resolve()))
        ):
            yield link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert list(broken_links(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    named = re.findall(r"\b(?:fooddiff|tests|configs|docs)/[\w/.]*\.(?:py|md)\b", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_broken_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A heading, of `three` words\n")
    good = "[a](other.md) [b](other.md#a-heading-of-three-words) [c](#top) [d](https://example.org/none) `[e](none.md)`"
    (tmp_path / "page.md").write_text(f"# Top\n{good}\n\n    [](none.md)\n\n[f](none.md) [g](other.md#none) [h](#no)\n")
    assert list(broken_links(tmp_path / "page.md")) == ["none.md", "other.md#none", "#no"]


def test_the_index_has_every_page_once():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name != "README.md")
    assert sorted(re.findall(r"\]\((\w+\.md)\)", index)) == pages


def test_the_reference_is_built_by_the_checks_as_the_index_says():
    (command,) = re.findall(r"python -W error -m pdoc .*", (ROOT / "docs" / "README.md").read_text())
    assert command in (ROOT / ".ci" / "run").read_text()
