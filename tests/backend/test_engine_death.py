"""Threads of engines and apps. If one dies, nobody waits for it, and the process ends at once, with the traceback."""

from __future__ import annotations

import asyncio
import ctypes
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lacre.asgi import App
from lacre.runtime import tasks
from lacre.runtime.tasks import TaskDied
from lacre_backend.app_thread import AHEAD, Elsewhere
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.job import EngineJob
from lacre_backend.engine.lens import LensTask
from lacre_backend.engine.protocol import DIED, EngineError, Event, Finish, Task, TaskKind
from lacre_backend.engine.tokens import Tokens
from lacre_backend.engine.watch import FAILED_STEPS, STUCK, EngineHealth
from lacre_backend.node.readiness import alive
from parts.stage import until
from parts.tiny_model import tiny_model

Threaded = LlamaEngine | LlamaEmbedder


class Killed(Exception):
    """What no code foresees."""


def kill(thread: str) -> None:
    """Raises in a thread, wherever it is in Python's code."""
    [ident] = [found.ident for found in threading.enumerate() if found.name == thread]
    assert ident is not None
    assert ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(Killed)) == 1


def task(engine: Threaded, name: str, prompt: str = "Hello there") -> Task:
    kind = TaskKind.EMBED if isinstance(engine, LlamaEmbedder) else TaskKind.GENERATE
    return Task(name, tuple(engine.tokenize(prompt)), 1 if kind is TaskKind.EMBED else 200, kind=kind)


def submitted(engine: Threaded) -> list[AsyncIterator[Event]]:
    """As many of three tasks as it still takes."""
    streams = []
    for number in range(3):
        try:
            streams.append(engine.submit(task(engine, f"t{number}")))
        except EngineError as exc:
            assert str(exc) in (DIED, "The engine is closed.")  # between the end of its work and that of its thread
    return streams


async def kill_at_work(engine: Threaded, thread: str) -> None:
    """Idle, it waits in C: a task wakes it. Returns when it is gone, after every task's stream ended."""
    kill(thread)
    failed = 0
    for stream in submitted(engine):
        try:
            async for event in stream:
                assert not (isinstance(event, Finish) and event.reason == "cancelled"), "that is how a closed engine ends"
        except EngineError as exc:
            failed += str(exc) == DIED
    assert failed
    await until(lambda: engine.died)


@pytest.fixture(params=[LlamaEngine, LlamaEmbedder])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Threaded]:
    path = tiny_model(tmp_path / "tiny.gguf", embeds=request.param is LlamaEmbedder)
    with closing(request.param(path, name="tiny", digest="", settings=LlamaSettings(n_ctx=512, slots=2, threads=1))) as found:
        yield found


async def test_who_waits_for_a_dead_thread_is_told(engine: Threaded) -> None:
    look = alive(engine)
    assert (engine.died, look()) == (False, None)
    await kill_at_work(engine, f"{'embed' if isinstance(engine, LlamaEmbedder) else 'decode'} tiny")
    assert look() is not None
    with pytest.raises(EngineError, match="has died"):
        engine.submit(task(engine, "late"))


class Unchecked(LlamaEngine):
    """Lets through what `check` refuses: llama.cpp fails at it, as it would at a device that is gone."""

    def _enter(self, jobs: Sequence[EngineJob], lensed: Sequence[LensTask]) -> None:
        for job in jobs:
            if job.task.id.startswith("bad"):
                job.tokens = Tokens([10**6] * 5, chained=False)
        super()._enter(jobs, lensed)


async def outcome(engine: LlamaEngine, name: str) -> str:
    try:
        return [event async for event in engine.submit(task(engine, name))][-1].__class__.__name__
    except EngineError as exc:
        return str(exc)


async def test_an_engine_whose_every_step_fails_is_dead(tiny: Path) -> None:
    """Otherwise it would take all of a pool's requests, and fail them. One that works now and then goes on."""
    settings = LlamaSettings(n_ctx=512, slots=2, threads=1)
    with closing(Unchecked(tiny, name="tiny", digest="", settings=settings)) as engine:
        for name in ("bad", "good"):
            for number in range(FAILED_STEPS - 1):
                assert "could not decode" in await outcome(engine, f"bad {name} {number}")
            assert (await outcome(engine, "good"), engine.died) == ("Finish", False)
        for number in range(FAILED_STEPS):
            assert "could not decode" in await outcome(engine, f"bad {number}")
        await until(lambda: engine.died)


def test_a_step_that_does_not_end_is_noticed() -> None:
    watch = EngineHealth()
    assert not watch.stuck
    watch.step()
    assert not watch.stuck
    watch._began = time.monotonic() - STUCK - 1
    assert watch.stuck
    watch.rest()
    assert not watch.stuck


async def test_a_closed_engine_did_not_die(engine: Threaded) -> None:
    engine.close()
    assert not engine.died
    with pytest.raises(EngineError, match="closed"):
        engine.submit(task(engine, "late"))


async def stops_its_loop(_scope: object, _receive: object, _send: object) -> None:
    asyncio.get_running_loop().stop()
    await asyncio.sleep(3600)


async def test_an_app_whose_thread_has_died_answers_nobody() -> None:
    app = Elsewhere(stops_its_loop, "api")
    async with http(app) as client:
        asked = tasks.spawn("asked", client.get("/"))
        await until(lambda: app.died)
        with pytest.raises(TaskDied):
            await client.get("/")
        with pytest.raises(RuntimeError, match="thread ended"):
            await asked


async def dying(who: str, path: str) -> None:
    if who == "app":
        with suppress(RuntimeError):
            await Elsewhere(stops_its_loop, "api")({"type": "http"}, asked, None)
    else:
        kind = LlamaEmbedder if who == "embed" else LlamaEngine
        engine = kind(Path(path), name="tiny", digest="", settings=LlamaSettings(n_ctx=512, slots=2, threads=1))
        await kill_at_work(engine, f"{who} tiny")
    await asyncio.sleep(3600)


PROGRAM = """
import asyncio, sys
from backend.test_engine_death import dying, tasks
from lacre_fabric import logs
logs.configure(sys.stderr)
with logs.last_words():
    asyncio.run(tasks.run(dying(*sys.argv[1:])))
"""


@pytest.mark.parametrize(("who", "dead"), [("decode", "decode tiny"), ("embed", "embed tiny"), ("app", "api")])
def test_the_process_ends_at_once_and_says_why(tmp_path: Path, who: str, dead: str) -> None:
    assert tasks.GRACE <= 1.0, "by force, if need be"
    path = tiny_model(tmp_path / "tiny.gguf", embeds=who == "embed")
    command = [sys.executable, "-c", PROGRAM, who, str(path)]
    tests = str(Path(__file__).parent.parent)
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=100, env={"PYTHONPATH": tests})
    assert done.returncode != 0
    assert "background work died" in done.stderr
    assert f'"{dead}"' in done.stderr
    assert '"traceback"' in done.stderr


# An app on a loop of its own: whatever it does, the node goes on beating


@pytest.fixture
def running() -> Iterator[Any]:
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(closing(Elsewhere(app)))


def http(app: App) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://app.test")


async def asked() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def hello(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    headers = [(b"x-thread", threading.current_thread().name.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(3 * AHEAD):
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"."})


async def test_it_answers_as_before(running: Any) -> None:
    async with http(running(hello)) as client:
        responses = await asyncio.gather(*(client.post("/", content=f"{number},") for number in range(20)))
    assert [response.text for response in responses] == [f"{number}," * 3 * AHEAD + "." for number in range(20)]
    assert {response.headers["x-thread"] for response in responses} == {"app"}


async def test_what_blocks_its_loop_does_not_block_this_one(running: Any) -> None:
    async def blocking(scope: Any, receive: Any, send: Any) -> None:
        time.sleep(1.0)  # noqa: ASYNC251 - as a parser would
        await hello(scope, receive, send)

    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.02)
            ticks += 1

    ticking = asyncio.create_task(tick())
    async with http(running(blocking)) as client:
        await client.post("/", content="x")
    ticking.cancel()
    assert ticks > 5


async def test_its_error_is_the_callers(running: Any) -> None:
    async def failing(scope: Any, receive: Any, send: Any) -> None:
        raise ValueError("as it said")

    with pytest.raises(ValueError, match="as it said"):
        await running(failing)({"type": "http"}, asked, None)


async def test_cancelled_here_is_cancelled_there(running: Any) -> None:
    began, ended = threading.Event(), threading.Event()

    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    call = asyncio.create_task(running(waiting)({"type": "http"}, asked, None))
    assert await asyncio.to_thread(began.wait, 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(ended.wait, 5)


async def test_a_reader_that_waits_makes_the_app_wait(running: Any) -> None:
    sent = 0

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        while True:
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
            sent += 1

    stalled = asyncio.Event()

    async def slow(message: Any) -> None:
        await stalled.wait()

    call = asyncio.create_task(running(endless)({"type": "http"}, asked, slow))
    await asyncio.sleep(0.3)
    assert sent <= 2 * AHEAD
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
