"""Node's own `openai` package, and curl, through `lacre proxy`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ecosystem.conftest import settings
from parts.npm import install
from parts.up import LACRE, Up

FOLDER = Path(__file__).resolve().parent / "node"
NODE, NPM, CURL = shutil.which("node"), shutil.which("npm"), shutil.which("curl")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def proxy(up: Up) -> Iterator[dict[str, str]]:
    """The environment of a program that uses it."""
    command = [*LACRE, "proxy", "--port", "0", "--json"]
    process = subprocess.Popen(command, env=settings(up), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    told = json.loads(line)
    yield {"PATH": os.environ["PATH"], "OPENAI_BASE_URL": told["base_url"], "OPENAI_API_KEY": told["api_key"]}
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture(scope="module")
def packages() -> None:
    install(FOLDER)


@pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed")
@pytest.mark.usefixtures("packages")
class TestNode:
    def does(self, proxy: dict[str, str], *what: str) -> dict[str, Any]:
        command = [str(NODE), "program.mjs", *what]
        done = subprocess.run(command, cwd=FOLDER, env=proxy, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def test_the_lock_names_no_host(self) -> None:
        assert "://" not in (FOLDER / "package-lock.json").read_text()

    def test_chat(self, proxy: dict[str, str]) -> None:
        told = self.does(proxy, "chat", "stream", "models", "errors")
        assert told["chat"]["text"] == told["stream"]["text"] != ""
        assert told["stream"]["pieces"] > 3
        assert "smollm2-135m" in told["models"]["models"]
        assert told["errors"] == {"name": "NotFoundError", "code": "model_not_found", "status": 404}

    def test_tools(self, proxy: dict[str, str]) -> None:
        told = self.does(proxy, "tools")["tools"]
        assert told["name"] == "get_weather" and set(told["arguments"]) == {"city"}

    def test_embeddings(self, proxy: dict[str, str]) -> None:
        assert self.does(proxy, "embeddings")["embeddings"] == {"length": 384, "many": 2}


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_curl(proxy: dict[str, str]) -> None:
    body = {"model": "smollm2-135m", "stream": True, "max_tokens": 8, "messages": [{"role": "user", "content": "Hi."}]}
    command = [
        str(CURL), "--silent", "--no-buffer", proxy["OPENAI_BASE_URL"] + "/chat/completions",
        "--header", f"authorization: Bearer {proxy['OPENAI_API_KEY']}", "--header", "content-type: application/json",
        "--data", json.dumps(body),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=280)
    events = [line.removeprefix("data: ") for line in done.stdout.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]" and len(events) > 3
