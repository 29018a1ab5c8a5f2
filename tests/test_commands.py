"""Commands that tests fork from a warm Python do what whole Pythons do, and nothing of one reaches the next."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from parts.auditing import written
from parts.commands import run_lacre
from parts.up import LACRE, alive, descendants
from parts.waiting import PATIENCE, wait_until

BARE = {"PATH": os.environ["PATH"]}


@pytest.mark.parametrize("words", [("--help",), ("audit", "verify", "nowhere"), ("frob",)], ids=" ".join)
def test_it_prints_and_ends_as_a_whole_python(words: tuple[str, ...], tmp_path: Path) -> None:
    whole = subprocess.run(
        [*LACRE, *words], capture_output=True, text=True, check=False, cwd=tmp_path, stdin=subprocess.DEVNULL
    )
    forked = run_lacre(*words, cwd=tmp_path)
    assert (forked.returncode, forked.stdout, forked.stderr) == (whole.returncode, whole.stdout, whole.stderr)


def test_a_command_has_its_own_environment_and_folder(tmp_path: Path) -> None:
    asyncio.run(written(tmp_path / "audit", 1))
    for columns in (40, 100, 40):
        lines = run_lacre("audit", "verify", "--help", env=BARE | {"COLUMNS": str(columns)}).stdout.splitlines()
        assert max(map(len, lines)) == columns
    assert "LACRE_URL" in run_lacre("ask", "x", env=BARE | {"HOME": str(tmp_path)}).stderr
    assert run_lacre("audit", "verify", "audit", cwd=tmp_path).returncode == 0
    assert run_lacre("audit", "verify", "audit").returncode != 0


def test_a_command_that_outlives_its_patience_is_killed(tmp_path: Path) -> None:
    asyncio.run(written(tmp_path / "audit", 1))
    run_lacre("--version")  # the process that forks has started
    before = set(descendants(os.getpid()))
    with pytest.raises(subprocess.TimeoutExpired):
        run_lacre("audit", "export", tmp_path / "audit", "--follow", seconds=1)
    wait_until(lambda: not [each for each in set(descendants(os.getpid())) - before if alive(each)], PATIENCE)
