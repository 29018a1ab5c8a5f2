"""What the documents show, run against a running gateway."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

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
