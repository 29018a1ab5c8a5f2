"""The official JSON-Schema-Test-Suite: how much of it is enforced, and that nothing invalid is let through."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parts.schema_suite import SUITE, Row, rows, table

pytestmark = pytest.mark.skipif(not SUITE.is_dir(), reason=f"no JSON-Schema-Test-Suite at {SUITE}")
PAGE = Path(__file__).parents[2] / "docs" / "schemas.md"
WANTED = {"pattern", "minimum", "multipleOf", "oneOf", "ref", "prefixItems", "const", "enum"}


@pytest.fixture(scope="module")
def found() -> list[Row]:
    return rows()


def test_nothing_invalid_is_admitted_and_nothing_valid_refused_without_a_reason(found: list[Row]) -> None:
    assert [wrong for row in found for wrong in row.wrong] == []


def test_four_of_five_schemas_are_enforced_and_the_others_refused_by_name(found: list[Row]) -> None:
    schemas, refused = sum(row.schemas for row in found), [keyword for row in found for keyword in row.refused]
    assert len(refused) <= 0.2 * schemas
    assert all(re.fullmatch(r"\$?[A-Za-z]+", keyword) for keyword in refused)
    assert {row.name for row in found if len(row.refused) < row.schemas} >= WANTED


def test_the_page_has_the_table(found: list[Row]) -> None:
    """`PYTHONPATH=tests .venv/bin/python -m parts.schema_suite` prints it anew."""
    assert table(found) in PAGE.read_text()
