"""Commands that read a whole audit log show a bar at a terminal, and nothing of it to programs."""

from __future__ import annotations

import asyncio
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from parts.auditing import written
from parts.terminal import at_terminal
from parts.up import LACRE

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "indexing the log": ("audit", "query", "{}", "--limit", "1"),
    "adding up": ("budget", "report", "--audit", "{}"),
    "deciding again": ("policy", "replay", "{}", "--against", str(ROOT / "policies")),
}


def test_an_export_into_a_pipe_has_its_bar_on_stderr_alone(tmp_path: Path) -> None:
    """rich would take what is written meanwhile to the terminal, away from the pipe."""
    asyncio.run(written(tmp_path / "audit", 300))
    command = [*LACRE, "audit", "export", str(tmp_path / "audit")]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm-256color", "COLUMNS": "120"}
    piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert len(piped.stdout.splitlines()) == 602 and not piped.stderr
    into = tmp_path / "exported"
    shown = at_terminal(["/bin/sh", "-c", f"{shlex.join(command)} > {shlex.quote(str(into))}"], environment)
    assert "exporting" in shown and "/602" in shown and "request_id" not in shown
    assert into.read_text() == piped.stdout
    assert "exporting" not in at_terminal(command, environment), "where the lines themselves are seen"


@pytest.mark.parametrize("what", COMMANDS)
def test_a_bar(tmp_path: Path, what: str) -> None:
    asyncio.run(written(tmp_path / "audit", 300))
    command = [*LACRE, *(part.format(tmp_path / "audit") for part in COMMANDS[what])]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TERM": "xterm-256color", "COLUMNS": "120"}
    piped = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert what not in piped.stdout + piped.stderr
    shown = at_terminal(command, environment)
    assert what in shown and "/602" in shown  # of 300 requests, a start and a stop
    assert piped.stdout.split()[0] in shown
