"""Every link in the documents leads to a file and, with a `#`, to a heading of it. Files and modules that they name exist."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^\s*```.*?^\s*```|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub names headings: lower case, without punctuation, hyphens for spaces."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            yield target


ROOMS = "sdk/|fabric/lacre_|gateway/lacre_|backend/lacre_|tests/|tools/|bench/|deploy/|examples/|policies/|requirements/"
NAMED = re.compile(rf"(?<![\w/.-])(?:{ROOMS})[\w./-]*\w")
MODULE = re.compile(r"(?<![\w.])python -m ((?:lacre|tests|bench)[\w.]*)")


def missing(text: str) -> list[str]:
    """Files and modules of ours that a text names, and that do not exist."""
    files = [name for name in NAMED.findall(text) if not (ROOT / name).exists()]
    return files + [name for name in MODULE.findall(text) if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_names_of(page: Path) -> None:
    assert (list(broken(page)), missing(page.read_text())) == ([], [])


def test_what_is_broken_is_seen(tmp_path: Path) -> None:
    text = "`tests/none.py`, `tests/docs/test_links.py`, `sdk/lacre/`; `python -m lacre.none`, `python -m lacre`"
    assert missing(text) == ["tests/none.py", "lacre.none"]
    page = tmp_path / "page.md"
    links = "[a](#the-x-a-title) [b](none.md) [c](#none) [d](https://e.example/) `[f](code.md)` [g](page.md)"
    page.write_text(f"# The `x`: a title\n{links}\n")
    assert list(broken(page)) == ["none.md", "#none"]
