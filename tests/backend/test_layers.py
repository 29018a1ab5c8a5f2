"""The API knows nothing of llama.cpp, and the engine's thread nothing of HTTP or JSON."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lacre_backend

ROOT = Path(lacre_backend.__file__).parent
FORBIDDEN = {
    "api": (
        "llama_cpp",
        "numpy",
        "lacre_backend.engine.generate",
        "lacre_backend.engine.model",
        "lacre_backend.engine.sampling",
    ),
    "engine": ("json", "starlette", "pydantic", "jinja2", "lacre.asgi", "lacre.wire", "lacre_fabric", "lacre_backend.api"),
}


def imports(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_layers(room: str) -> None:
    files = sorted((ROOT / room).glob("*.py"))
    assert len(files) > 5
    for path in files:
        for name in imports(path):
            assert not any(name == f or name.startswith(f + ".") for f in FORBIDDEN[room]), f"{path.name} imports {name}"
