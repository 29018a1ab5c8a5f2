"""The whole path: `lacre up` with the real nats-server, gateway, worker and model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import lacre
from parts.up import Up


@pytest.fixture(scope="session")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    with Up.start(tmp_path_factory.mktemp("up") / "state") as live:
        yield live


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Up]:
    """For tests that change or kill it."""
    with Up.start(tmp_path / "state") as live:
        yield live


@pytest.fixture
def env(up: Up, monkeypatch: pytest.MonkeyPatch) -> Up:
    """What `. DIR/env` does for a shell."""
    monkeypatch.setenv("LACRE_URL", up.url)
    monkeypatch.setenv("LACRE_TOKEN", up.token)
    monkeypatch.setenv("XDG_STATE_HOME", str(up.state.parent / "xdg"))
    return up


@pytest.fixture
def client(env: Up) -> Iterator[lacre.Client]:
    with lacre.Client() as client:
        yield client
