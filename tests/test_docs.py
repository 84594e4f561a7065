"""Documentation that can be checked: links, anchors, paths, the tree of the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"(?<![\w./])(?:aligner|tests|tools|conf|launch|docs)/[\w./-]*\w")
"""A path from the root of the tree."""


def anchors(page: Path) -> set[str]:
    """The headings of a page as the fragments that GitHub makes of them."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, fragment = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (fragment and target.suffix == ".md" and fragment not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_that_are_named_exist(page: Path) -> None:
    text = re.sub(r"\S*NAME\S*", "", LINK.sub("", page.read_text()))  # NAME stands for a name
    assert not [
        path for path in PATH.findall(text) if not (ROOT / path).exists() and not (ROOT / f"{path}.md").exists()
    ]


def test_the_tree_of_the_readme_has_every_package() -> None:
    tree = re.search(r"^aligner/\n((?:  .*\n)+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert tree
    listed = set(re.findall(r"^  (\w+)/", tree[1], re.MULTILINE))
    assert listed == {file.parent.name for file in (ROOT / "aligner").glob("*/__init__.py")}
