"""The README's pictures show what this version does: the same commands and the same request, run again."""

from __future__ import annotations

import re

import pytest

from parts import pictures
from parts.up import Up

STALE = "the picture is stale: run `make pictures` and look at the result"


@pytest.mark.slow
def test_the_path_is_current(up: Up) -> None:
    assert pictures.run(up.url, up.token).digest() == pictures.held("path.svg"), STALE


@pytest.mark.slow
def test_the_session_is_current(up: Up) -> None:
    shown = pictures.session(up)
    assert shown[1].strip()
    assert pictures.session_digest(shown) == pictures.held("terminal.svg"), STALE


@pytest.mark.parametrize("name", ["path.svg", "terminal.svg"])
def test_a_picture_loads_nothing(name: str) -> None:
    drawn = (pictures.FOLDER / name).read_text()
    assert set(re.findall(r"https?://[^\s\"'<)]+", drawn)) == {"http://www.w3.org/2000/svg"}
    assert "<script" not in drawn


def test_a_change_shows() -> None:
    """A row more, a command less or another outer field makes another digest."""
    rows = ["✓  root  here\n✓  signer  there\n", ""]
    assert pictures.session_digest(rows) != pictures.session_digest(["✓  root  here\n", ""])
    assert "signer" in pictures.session_digest(rows)
