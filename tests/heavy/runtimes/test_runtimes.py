"""The npm package in Deno and in Bun: the programs that Node runs, unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from parts.chat_app import ChatApp
from parts.live import Gateway, serving
from parts.node_chat import INTEROP
from parts.npm import install
from parts.relay import Relay

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
MODULES = HERE / "node_modules"
# The programs themselves, as their packages carry them: no script of a package is run.
RUNTIMES = {
    "deno": [str(MODULES / "@deno" / "linux-x64-glibc" / "deno"), "run", "-A", "--no-lock", "--node-modules-dir=manual"],
    "bun": [str(MODULES / "@oven" / "bun-linux-x64" / "bin" / "bun"), "run"],
}
VECTORS = sorted(path.stem for path in (ROOT / "docs" / "vectors").glob("*.json"))


@pytest.fixture(scope="module", autouse=True)
def packages() -> Iterator[None]:
    install(HERE)
    install(ROOT / "sdk" / "javascript")
    yield


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> list[str]:
    return RUNTIMES[request.param]


async def ran(command: list[str], home: Path, **more: str) -> tuple[int, str, str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "XDG_STATE_HOME": str(home), **more}
    done = await anyio.run_process(command, cwd=INTEROP, env=environment, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("name", VECTORS)
async def test_the_vectors(runtime: list[str], tmp_path: Path, name: str) -> None:
    code, said, error = await ran([*runtime, "vectors.mjs", name], tmp_path)
    assert code == 0 and said.count("ok ") > 16, said + error


async def test_what_it_refuses(runtime: list[str], tmp_path: Path) -> None:
    code, said, error = await ran([*runtime, "refuse.mjs"], tmp_path)
    assert code == 0, error
    found: dict[str, Any] = json.loads(said)
    assert len(found) == 8
    assert {name: each["wrong"] for name, each in found.items() if each["wrong"] or each["cases"] < 20} == {}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_sealed_chat(runtime: list[str], tmp_path: Path, stream: bool) -> None:
    async with serving(Gateway(Relay(ChatApp()))) as gateway:
        asked = [*runtime, "ask.mjs", "{}", json.dumps({"stream": stream}), "How many Baltic states?"]
        code, said, error = await ran(asked, tmp_path, LACRE_URL=gateway.url, LACRE_TOKEN="t0ken")
    assert code == 0, said + error
    lines = [json.loads(line) for line in said.splitlines()]
    assert [line["piece"] for line in lines[:-1]] == (["one ", "two ", "three"] if stream else [])
    [part] = lines[-1]["info"]["parts"]
    assert part["receipt"]["completion_tokens"] == 3
    assert b"Baltic" not in gateway.relay.requests[-1].content
    [kept] = (tmp_path / "lacre" / "manifests-js").glob("seen.*.json")
    assert kept.stat().st_mode & 0o777 == 0o600


async def test_a_bent_answer(runtime: list[str], tmp_path: Path) -> None:
    async with serving(Gateway(Relay(ChatApp(), bend=lambda pieces: pieces[:-1]))) as gateway:
        asked = [*runtime, "ask.mjs", '{"retries": 0, "resume": 0}', "{}", "How many?"]
        code, _, error = await ran(asked, tmp_path, LACRE_URL=gateway.url, LACRE_TOKEN="t0ken")
    assert code == 1
    assert json.loads(error.splitlines()[-1])["error"] == "TruncatedError"
