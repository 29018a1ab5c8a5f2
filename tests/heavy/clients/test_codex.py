"""Codex, OpenAI's coding agent, edits a file through `lacre proxy`: with no network but loopback, in a home of its own."""

from __future__ import annotations

import asyncio
import json
import platform
import shutil
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from ecosystem import bodies
from ecosystem.clients import CODEX, settle
from parts import scripts
from parts.loopback import only_loopback
from parts.memory import found_in_memory
from parts.npm import install
from parts.platforms import canary, watched
from parts.stage import SCRIPTED, ScriptedStage, until
from parts.waiting import PATIENCE

FOLDER = CODEX.room
# It asks once, so that failures are seen. What runs has no network: its own sandbox needs more than some machines allow.
OPTIONS = [
    "--strict-config", "--skip-git-repo-check", "--sandbox", "danger-full-access",
    "-c", "model_providers.lacre.request_max_retries=0", "-c", "model_providers.lacre.stream_max_retries=0",
]  # fmt: skip
NODE, NPM = shutil.which("node"), shutil.which("npm")

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.timeout(400),
    pytest.mark.skipif(NODE is None or NPM is None, reason="node and npm are not installed"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="Codex has no program for this machine"),
]


@pytest.fixture(scope="module")
async def live(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ScriptedStage]:
    async with ScriptedStage.speaking(tmp_path_factory.mktemp("stage")) as live:
        yield live


@pytest.fixture(scope="module")
def program() -> str:
    install(FOLDER)
    return str(FOLDER / "node_modules/.bin/codex")


@dataclass(frozen=True, slots=True)
class Codex:
    """Codex in a project of its own. port: the only one that it reaches."""

    program: str
    port: int
    project: Path
    environment: dict[str, str]

    @contextmanager
    def running(self, asked: str, *options: str) -> Iterator[subprocess.Popen[str]]:
        """Its process, which was asked something."""
        line = [self.program, "exec", *OPTIONS, *options, "--cd", str(self.project), asked]
        with only_loopback(self.port) as inside:
            pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = subprocess.Popen(inside(*line), env=self.environment, text=True, **pipes)
            try:
                yield process
            finally:
                process.kill()
                process.communicate()

    def ask(self, asked: str) -> list[dict[str, Any]]:
        """The events of a whole run."""
        with self.running(asked, "--json") as process:
            said, complained = process.communicate(timeout=120)
        assert said, complained
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]


@pytest.fixture
def codex(live: ScriptedStage, program: str, tmp_path: Path) -> Codex:
    home, project = tmp_path / "home", tmp_path / "project"
    home.mkdir()
    project.mkdir()
    settings = (FOLDER / "config.toml").read_text()
    (home / "config.toml").write_text(settings.replace("http://127.0.0.1:11435/v1", live.proxy.base_url))
    environment = live.proxy.environment() | {"HOME": str(home), "CODEX_HOME": str(home)}
    return Codex(program, live.proxy.port, project, environment)


def texts(events: list[dict[str, Any]]) -> list[str]:
    """What it said."""
    done = [event["item"] for event in events if event["type"] == "item.completed"]
    return [item["text"] for item in done if item["type"] == "agent_message"]


async def test_it_answers_in_a_stream(codex: Codex) -> None:
    """It knows no other way."""
    events = await asyncio.to_thread(codex.ask, "[[plain]]")
    whole = texts(events) == [scripts.PLAIN]
    settle(CODEX, "scripted", {"chat": whole, "stream": whole}, events)


async def test_a_long_answer(codex: Codex) -> None:
    events = await asyncio.to_thread(codex.ask, "[[long]]")
    settle(CODEX, "scripted", {"long": texts(events) == [scripts.LONG]}, events)


async def test_what_the_model_thought(codex: Codex) -> None:
    """It prints that for people, with `show_raw_agent_reasoning`, before the answer."""
    with codex.running("[[think]]") as process:
        said, told = await asyncio.to_thread(process.communicate, timeout=120)
    apart = said.strip() == scripts.PLAIN and told.splitlines().count(scripts.THOUGHT) == 1
    settle(CODEX, "scripted", {"reasoning": apart}, said + told)


async def test_it_edits_a_file_and_the_gateway_sees_none_of_it(live: ScriptedStage, codex: Codex) -> None:
    """The prompt, what the file holds, and the patch: in the worker's memory, and nowhere else on the servers' side."""
    asked, old, new, beside = (canary() for _ in range(4))
    (codex.project / scripts.FILE).write_text(f"{beside}\n{old}\n")
    needles = {"prompt": asked.encode(), "file": beside.encode(), "patch": scripts.patch(old, new).splitlines()[-2].encode()}
    call = asyncio.to_thread(codex.ask, f"Edit my notes, {asked}: [[edit {old} {new}]]")
    pids = {"gateway": live.gateways[0].process.pid, "nats": live.nats.pid, "worker": live.scripted.process.pid}
    since = len(live.scripted.asked())
    events, seen = await watched(pids, needles, call)
    bodies.keep(CODEX, live, since)
    assert (codex.project / scripts.FILE).read_text() == f"{beside}\n{new}\n"
    assert texts(events)[-1] == f"The file says {new}."
    settle(CODEX, "scripted", {"tools": True}, events)
    assert seen == {"gateway": set(), "nats": set(), "worker": set(needles)}
    assert found_on_disk(kept_by(live), needles) == set()
    # The same search finds what the gateway did write, and what Codex did.
    assert found_on_disk([live.audit_of()], needles | {"model": SCRIPTED.encode()}) == {"model"}
    assert found_on_disk([codex.project], needles) == {"file"}


def kept_by(live: ScriptedStage) -> list[Path]:
    """What the servers keep on disk, and each file that the gateway holds open."""
    opened = [each.resolve() for each in Path(f"/proc/{live.gateways[0].process.pid}/fd").iterdir()]
    return [live.site.folder, *(path for path in opened if path.is_file())]


def found_on_disk(places: Sequence[Path], needles: Mapping[str, bytes]) -> set[str]:
    """The names of those that a file there holds, or a file in a folder there."""
    files = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    assert files
    contents = [path.read_bytes() for path in files]
    return {name for name, needle in needles.items() if any(needle in content for content in contents)}


async def test_the_same_search_finds_what_a_gateway_is_told_in_clear(live: ScriptedStage) -> None:
    """A request whose head has no end yet: the gateway holds its path."""
    word, pid, port = canary().encode(), live.gateways[0].process.pid, urlsplit(live.gateways[0].url).port
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /" + word + b" HTTP/1.1\r\nhost: gateway\r\n")
        await until(lambda: bool(found_in_memory(pid, {"word": word})), PATIENCE)


async def test_an_answer_that_it_leaves(live: ScriptedStage, codex: Codex) -> None:
    """Ctrl-C ends it in the middle of a stream, and the worker stops computing."""
    begun, cancelled = live.scripted.begun(), live.scripted.ends()["cancelled"]
    with codex.running("[[slow]]") as process:
        await until(lambda: live.scripted.begun() > begun, PATIENCE, live.scripted.said)
        process.send_signal(signal.SIGINT)
        await asyncio.to_thread(process.communicate, timeout=PATIENCE)
    await until(lambda: live.scripted.ends()["cancelled"] == cancelled + 1, PATIENCE, live.scripted.said)
    settle(CODEX, "scripted", {"cancellation": True}, "")
