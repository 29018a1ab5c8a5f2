"""Codex, OpenAI's coding agent, edits a file through `lacre proxy`: with no network but loopback, in a home of its own."""

from __future__ import annotations

import asyncio
import json
import platform
import shutil
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from ecosystem.clients import CODEX, settle
from parts import scripts
from parts.loopback import only_loopback
from parts.npm import install
from parts.platforms import canary, watched
from parts.stage import ScriptedStage

FOLDER = Path(__file__).resolve().parent / "codex"
NODE, NPM = shutil.which("node"), shutil.which("npm")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="Codex has no program for this machine"),
]


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedStage]:
    async with ScriptedStage.speaking(tmp_path_factory.mktemp("stage")) as live:
        yield live


@pytest.fixture(scope="module")
def codex() -> str:
    install(FOLDER)
    return str(FOLDER / "node_modules/.bin/codex")


Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(live: ScriptedStage, codex: str, tmp_path: Path) -> Run:
    """Asks it for something, in a project of its own. Returns the events that it printed."""
    home, project = tmp_path / "home", tmp_path / "project"
    home.mkdir()
    project.mkdir()
    (project / scripts.FILE).write_text(f"first\n{scripts.OLD}\nlast\n")
    settings = (FOLDER / "config.toml").read_text()
    (home / "config.toml").write_text(settings.replace("http://127.0.0.1:11435/v1", live.proxy.base_url))
    environment = live.proxy.environment() | {"HOME": str(home), "CODEX_HOME": str(home)}

    def run(asked: str, *more: str) -> list[dict[str, Any]]:
        command = [codex, "exec", "--strict-config", "--skip-git-repo-check", "--json", "--cd", str(project), *more, asked]
        with only_loopback(live.proxy.port) as inside:
            done = subprocess.run(
                inside(*command),
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        assert done.stdout, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    return run


def texts(events: list[dict[str, Any]]) -> list[str]:
    """What it said."""
    done = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in done if item["type"] == "agent_message"]


async def test_it_answers_in_a_stream(run: Run) -> None:
    """It knows no other way."""
    events = await asyncio.to_thread(run, "[[plain]]")
    whole = texts(events) == [scripts.PLAIN]
    settle(CODEX, "scripted", {"chat": whole, "stream": whole}, events)


async def test_a_long_answer(run: Run) -> None:
    events = await asyncio.to_thread(run, "[[long]]")
    settle(CODEX, "scripted", {"long": texts(events) == [scripts.LONG]}, events)


async def test_it_edits_a_file_and_the_gateway_sees_none_of_it(live: ScriptedStage, run: Run, tmp_path: Path) -> None:
    word = canary()
    pids = {"gateway": live.gateways[0].process.pid, "nats": live.nats.pid, "worker": live.scripted.process.pid}
    needles = {"word": word.encode(), "file": scripts.OLD.encode()}
    events, seen = await watched(pids, needles, asyncio.to_thread(run, f"Please edit my notes: [[edit {word}]]"))
    assert (tmp_path / "project" / scripts.FILE).read_text() == f"first\n{word}\nlast\n"
    assert texts(events)[-1] == f"The file says {word}."
    settle(CODEX, "scripted", {"tools": True}, events)
    assert seen == {"gateway": set(), "nats": set(), "worker": set(needles)}
    kept = [path for folder in (live.site.folder, live.audit_of().parent) for path in folder.rglob("*") if path.is_file()]
    assert kept
    for path in kept:
        assert word.encode() not in path.read_bytes(), path
