"""Other people's programs, each in the environment it comes with, through a running gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from parts.both import serving_both
from parts.up import Up

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with serving_both(tmp_path_factory.mktemp("up")) as live:
        yield live


def environment(name: str) -> str:
    """Its interpreter; made now where `make environments` has not."""
    made = [sys.executable, str(ROOT / "tools/environments.py"), name]
    return subprocess.run(made, check=True, capture_output=True, text=True).stdout.strip()


def settings(up: Up) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LACRE_", "OPENAI_", "PYTHON"))}
    state = {"XDG_STATE_HOME": str(up.state.parent / "xdg"), "PYTHONPATH": str(ROOT / "sdk"), "PYTHONWARNINGS": "ignore"}
    return kept | state | {"LACRE_URL": up.url, "LACRE_TOKEN": up.token}


@pytest.fixture
def run(up: Up) -> Run:
    def run(name: str, sealed: str, program: str, *what: str) -> dict[str, Any]:
        command = [environment(name), str(PROGRAMS / program), *what]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=280, env=settings(up) | {"SEALED": sealed}
        )
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told

    return run
