"""Other people's servers of models, sealed: each behind a worker's `[upstream]`, with a gateway and a NATS in real processes.

    with served(command, port, folder / "server.log") as server:
        await server.answers("/health")
        async with behind(folder, {"encoder": table(server.url, "encoder", ["POST /predictions/encoder"])}) as live:
            client = caller(live)

`asked_in_secret` then asks through it, and looks through the memory of every process on the way.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx2

import lacre
from parts.memory import found_in_memory
from parts.stage import LiveStage, launched, until

T = TypeVar("T")

GUIDE: Final = Path(__file__).resolve().parents[2] / "docs/platforms.md"
SCOPE: Final = "lacre:http"
START: Final = 120  # seconds for a server to load its model
# Bytes of an answer that no other one has: 40 digits and commas of computed numbers, or 40 letters of a text.
PIECE: Final = 40
ROUNDS: Final = 20  # of which one catches the worker with what it holds


@dataclass
class Served:
    """A server of models, in a process of its own."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    async def answers(self, path: str) -> None:
        """Waits until it answers 200 to a GET of `path`."""

        async def ready() -> bool:
            assert self.process.poll() is None, self.said()
            async with httpx2.AsyncClient(trust_env=False) as client:
                try:
                    return (await client.get(self.url + path)).status_code == 200
                except httpx2.TransportError:
                    return False

        await until(ready, START, self.said)

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-2000:]


@contextmanager
def served(command: Sequence[str | Path], port: int, log: Path, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """The command's process, which listens on this port of 127.0.0.1. It ends in order, with what it started itself."""
    process = launched([str(part) for part in command], log, env=None if env is None else dict(env))
    try:
        yield Served(f"http://127.0.0.1:{port}", log, process)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def table(origin: str, model: str, allow: Sequence[str], more: str = "", upstream: str = "") -> str:
    """A worker's `[upstream]`. more: lines of the model's table. upstream: further lines of the first one."""
    return f"""
        [upstream]
        origin = "{origin}"
        {upstream}
        [[upstream.models]]
        name = "{model}"
        allow = {json.dumps(list(allow))}
        {more}
    """


def behind(folder: Path, upstreams: Mapping[str, str]) -> AbstractAsyncContextManager[LiveStage]:
    """A gateway, NATS, and one worker for each of the tables, by the names of their models."""
    return LiveStage.on_air(folder, upstreams=upstreams)


def caller(live: LiveStage, **options: Any) -> lacre.AsyncClient:
    """The client of an application that may use the action `http`."""
    return live.client(live.token("mallory", scopes=[SCOPE]), **options)


def documented(heading: str) -> dict[str, str]:
    """The blocks of code below this heading of docs/platforms.md, by language: a suite runs what its section says."""
    section = GUIDE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))


def canary() -> str:
    """A word that no process's memory holds yet."""
    return "zq7-kittiwake-" + os.urandom(8).hex()


def on_the_way(live: LiveStage, worker: int = 0) -> dict[str, int]:
    """Each process that a request passes: `gateway`, `nats` and `worker`. worker: which one, counted as in the tables."""
    return {"gateway": live.gateways[0].process.pid, "nats": live.nats.pid, "worker": live.workers[worker].process.pid}


async def watched(pids: Mapping[str, int], needles: Mapping[str, bytes], call: Awaitable[T]) -> tuple[T, dict[str, set[str]]]:
    """What the call returned; and which needles each process's memory held at any time while it ran, or once after."""
    running = asyncio.ensure_future(call)
    seen: dict[str, set[str]] = {name: set() for name in pids}
    over = False
    while not over:
        over = running.done()
        for name, pid in pids.items():
            seen[name] |= await asyncio.to_thread(found_in_memory, pid, needles)
    return await running, seen


async def asked_in_secret(
    live: LiveStage, word: str, ask: Callable[[], Awaitable[httpx2.Response]], worker: int = 0
) -> httpx2.Response:
    """The answer to a request that holds `word`, which is asked at least twice.

    Gateway and NATS hold the word at no time, nor a piece of the answer. The worker, which opens the request, shows that the
    same scan finds both. It keeps large texts for a moment only, so that a scan may miss one: then the request is repeated.
    """
    pids = on_the_way(live, worker)
    first, found = await watched(pids, {"asked": word.encode()}, ask())
    assert first.status_code == 200, first.text
    middle = (len(first.content) - PIECE) // 2
    assert middle > 0, first.text
    needles = {"asked": word.encode(), "answered": first.content[middle : middle + PIECE]}
    for _ in range(ROUNDS):
        again, seen = await watched(pids, needles, ask())
        assert again.content == first.content
        found = {name: found[name] | seen[name] for name in pids}
        assert found["gateway"] == found["nats"] == set()
        if found["worker"] == set(needles):
            return first
    raise AssertionError(f"a scan that finds only {found['worker']} in the worker's memory shows nothing")
