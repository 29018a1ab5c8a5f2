"""Suites that need an environment too large for every run: `make test-heavy`.

Rules
- A suite is a folder here, and has its rooms in suites.toml. Everything in it is marked `heavy`.
- What it needs in Python is in NAME.lock of its folder, compiled by tools/lock.sh from NAME.in. `environment("NAME")` makes
  it, outside the clone, when a test asks: what does not run costs nothing.
- PyTorch goes into no lock file. `environment_with_torch("NAME")` installs it once for all suites that need it.
- `projector` alone runs in `.venv`, where `make test-heavy` puts llama-cpp-python with mtmd in place of the one without.
- What is not there is a failure, and no reason to skip: CI must not pass without having looked.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Final

import pytest

import environments
from lacre_backend.workshop import converter

HEAVY = Path(__file__).resolve().parent
ROOT = HEAVY.parents[1]
# Of one test, with the environment that it may be the first to make.
SECONDS = 600
PIP: Final = ("-m", "pip", "--disable-pip-version-check", "--quiet")

Environment = Callable[[str], str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HEAVY):
            item.add_marker("heavy")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(SECONDS))


@pytest.fixture(scope="session")
def environment() -> Environment:
    """By the name of its lock file, the environment's interpreter. It has no Lacre: give it PYTHONPATH."""
    return lambda name: str(environments.ready(name))


@pytest.fixture(scope="session")
def environment_with_torch() -> Environment:
    return lambda name: str(environments.ready_with_torch(name))


@pytest.fixture(scope="session")
def llama_cpp_source() -> Path:
    """The locked source archive of llama-cpp-python, which holds llama.cpp's. It is kept beside the environments."""
    lock = ROOT / "requirements/native.lock"
    folder = environments.folder().parent / "sources" / sha256(lock.read_bytes()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # the processes of `pytest -n` ask at the same time
        if not (folder / converter.ARCHIVE).exists():
            # Built by nobody: what builds it is here already, and tells pip its name and version.
            source = ["--no-deps", "--require-hashes", "--no-build-isolation", "--no-binary", "llama-cpp-python"]
            with tempfile.TemporaryDirectory(dir=folder) as made:
                subprocess.run([sys.executable, *PIP, "download", *source, "-r", lock, "--dest", made], check=True)
                (Path(made) / converter.ARCHIVE).rename(folder / converter.ARCHIVE)
    return folder / converter.ARCHIVE
