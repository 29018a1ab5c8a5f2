"""The runbooks, as they stand: each is one shell session with real processes (see `parts.runbooks`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from parts.runbooks import INDEX, RUNBOOKS, STAGES, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", RUNBOOKS)
async def test_a_runbook(name: str, tmp_path: Path) -> None:
    await run(name, tmp_path)


def test_every_stage_has_its_runbook_and_the_index_names_all() -> None:
    assert STAGES - RUNBOOKS.keys() == set()
    assert [name for name in RUNBOOKS if f"]({name}.md)" not in INDEX.read_text()] == []
