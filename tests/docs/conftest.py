"""What the documents show, run against a running gateway."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from parts.both import serving_both
from parts.up import Up


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with serving_both(tmp_path_factory.mktemp("up")) as live:
        yield live


@pytest.fixture
def shell(up: Up) -> dict[str, str]:
    """The environment of a shell in which `.venv` was activated and `DIR/env` was read."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LACRE_", "OPENAI_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return kept | {"PATH": path, "LACRE_URL": up.url, "LACRE_TOKEN": up.token, "XDG_STATE_HOME": str(up.state.parent / "xdg")}


def ran(command: list[str], shell: dict[str, str], what: object = "", **options: Any) -> str:
    """What a program printed; every warning of a Python is an error. what: its name, where it fails."""
    command = [sys.executable, "-W", "error", *command]
    done = subprocess.run(command, check=False, env=shell, capture_output=True, text=True, timeout=280, **options)
    assert done.returncode == 0, f"{what}\n{done.stdout}{done.stderr}"
    return str(done.stdout)


@contextmanager
def served(app: str, folder: Path, shell: dict[str, str]) -> Iterator[httpx2.Client]:
    """uvicorn runs MODULE:APP of that folder; the client waits in the socket's queue until it is there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-m", "uvicorn", "--app-dir", str(folder), "--fd", str(listener.fileno()), app]
        process = subprocess.Popen([*command, "--log-level", "warning"], cwd=folder, env=shell, pass_fds=[listener.fileno()])
        try:
            with httpx2.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=280) as client:
                client.get("/")
                yield client
        finally:
            process.terminate()
            process.wait(30)
