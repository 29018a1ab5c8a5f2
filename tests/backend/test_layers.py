"""The API knows nothing of llama.cpp, and the engine's thread nothing of HTTP or JSON."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lacre_backend

ROOT = Path(lacre_backend.__file__).parent
ENGINE = [f"lacre_backend.engine.{name}" for name in ("generate", "model", "sampling")]
FORBIDDEN = {
    "api": ("llama_cpp", "numpy", *ENGINE),
    "engine": ("json", "starlette", "pydantic", "jinja2", "lacre.asgi", "lacre.wire", "lacre_fabric", "lacre_backend.api"),
}


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            yield from (prefix + alias.name for alias in node.names)


@pytest.mark.parametrize("room", FORBIDDEN)
def test_layers(room: str) -> None:
    files = sorted((ROOT / room).glob("*.py"))
    assert len(files) > 5
    for path in files:
        for name in imports(path):
            assert not any(name == f or name.startswith(f + ".") for f in FORBIDDEN[room]), f"{path.name} imports {name}"
