"""What a client refuses, as files that the Python SDK and the npm package both run: tests/interop has the other half."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from refusals.__main__ import DATA, FILES, text
from refusals.form import edit, edited, packed, unpacked


def content(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text())


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_what_its_generator_makes(name: str) -> None:
    """With what this SDK says of each case. To write the files anew: `PYTHONPATH=tests python -m refusals`."""
    assert (DATA / f"{name}.json").read_text() == text(FILES[name][0]())


@pytest.mark.parametrize("name", FILES)
def test_the_sdk_says_so_of_what_the_file_holds(name: str) -> None:
    """From the file alone, as another client reads it."""
    held, check = content(name), FILES[name][1]
    wrong = {case["name"]: said for case in held["cases"] if (said := check(held, case)) != case["said"]}
    assert not wrong


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_names_of_its_own_and_cases_of_both_kinds(name: str) -> None:
    cases = content(name)["cases"]
    assert max(Counter((case.get("of"), case.get("to"), case["name"]) for case in cases).values()) == 1
    kinds = {"is" in case["said"] for case in cases}
    assert kinds == ({False} if name == "outside" else {True, False})


def test_bytes_and_edits_keep_what_they_stand_for() -> None:
    for data in (b"", b"text", b"\xff\0", b"a" * 5000 + b"\n" + bytes(700), "é\n".encode()):
        assert unpacked(json.loads(json.dumps(packed(data)))) == data
    for before, after in (("abc", "abc"), ("abc", "abbc"), ("aaa", "aa"), ("abc", ""), ("", "x"), ("abab", "ab")):
        assert edited(before, edit(before, after)) == after
