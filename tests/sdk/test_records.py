"""Records are frozen for the type checker, equal by value, and plain slots at run time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lacre.runtime.records import record

ROOT = Path(__file__).resolve().parents[2]
MUTATING = """
from lacre.runtime.records import record

@record(frozen=True, slots=True)
class Pair:
    left: int
    right: int = 2

def change(pair: Pair) -> None:
    pair.left = 3
"""


@record(frozen=True, slots=True)
class Pair:
    left: int
    right: int = 2


def test_a_record_is_a_value() -> None:
    assert Pair(1) == Pair(left=1, right=2) != Pair(2)
    assert hash(Pair(1)) == hash(Pair(1, 2))
    assert not hasattr(Pair(1), "__dict__")


def test_words_that_would_promise_something_else_are_refused() -> None:
    with pytest.raises(TypeError):
        record(frozen=False, slots=True)


@pytest.mark.slow
def test_mypy_refuses_an_assignment(tmp_path: Path) -> None:
    (tmp_path / "mutating.py").write_text(MUTATING)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "", "--cache-dir", tmp_path, "mutating.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"MYPYPATH": str(ROOT / "sdk")}, capture_output=True, text=True, check=False
    )
    assert 'mutating.py:10: error: Property "left" defined in "Pair" is read-only' in done.stdout, done.stdout + done.stderr
