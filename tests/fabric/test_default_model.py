"""How `lacre up` asks for the default model's file: whatever goes wrong there, the shipped one is served."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lacre_fabric.operate.default_model import DefaultFile, fastest
from lacre_fabric.operate.site import Site
from parts.up import alive

ANSWER = {"path": "/cache/fast.gguf", "shipped": False, "told": "as BF16, 1.8 times as fast"}


async def asked(code: str, limit: float = 60.0) -> tuple[DefaultFile, list[str]]:
    """Of a child that runs this code. Also the lines that it told."""
    told: list[str] = []
    return await fastest(told.append, (sys.executable, "-P", "-c", code), limit), told


async def test_what_the_child_says_is_served_and_told() -> None:
    found, told = await asked(f"import sys; print('measuring', file=sys.stderr); print({json.dumps(ANSWER)!r})")
    assert found.path == Path("/cache/fast.gguf")
    assert found.told.startswith("smollm2-135m: as BF16, 1.8 times as fast")
    assert told == ["measuring"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (f"print({json.dumps({**ANSWER, 'shipped': True, 'told': 'the shipped file, because x'})!r})", "because x"),
        ("raise SystemExit(3)", "ended with status 3"),
        ("import os; os.abort()", "ended with status -6"),
        ("print('[]')", "is not a JSON object"),
        ("print('{}')", "'shipped' must be true or false"),
        ("", "is not"),
    ],
)
async def test_else_the_shipped_file_is_served(code: str, why: str) -> None:
    found, _ = await asked(code)
    assert found.path is None
    assert found.told.startswith("smollm2-135m: the shipped file, because ") and why in found.told, found.told


async def test_a_child_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    found, told = await asked(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(99)", 2.0
    )
    assert found.path is None and "took more than 2 s" in found.told
    assert not alive(int((tmp_path / "pid").read_text())) and told == []


def test_the_workers_settings_name_the_file_as_long_as_it_is_served(tmp_path: Path) -> None:
    site = Site.load_or_new(tmp_path / "state", {"default": ("smollm2-135m",)})
    site.create()
    path = site.worker_settings("default")

    def written(default: Path | None) -> str:
        site.write_settings("nats://127.0.0.1:4222", 8321, {"default": [{"name": "smollm2-135m"}]}, default=default)
        return path.read_text()

    assert "default_model" not in written(None)
    path.write_text("# by a person\n" + path.read_text())
    assert 'default_model = "/cache/fast.gguf"\n' in written(Path("/cache/fast.gguf"))
    assert written(Path("/cache/fast.gguf")).index("default_model") < path.read_text().index("[[models]]")
    assert 'default_model = "/cache/other.gguf"\n' in written(Path("/cache/other.gguf"))
    assert "default_model" not in written(None)
    assert path.read_text().startswith("# by a person\n")
