"""The npm package's dependencies, and a home of its own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from parts.node_chat import INTEROP, NODE, NPM
from parts.npm import install


@pytest.fixture(scope="session", autouse=True)
def packages() -> None:
    if NODE is not None and NPM is not None:
        install(INTEROP.parents[1] / "sdk" / "javascript")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the package remembers manifests."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "lacre" / "manifests-js"
