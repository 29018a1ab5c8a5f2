"""An app on a loop of its own: it answers as before, and whatever it does, the node goes on beating."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from lacre.asgi import App
from lacre_backend.app_thread import AHEAD, Elsewhere


@pytest.fixture
async def running() -> AsyncIterator[Any]:
    made: list[Elsewhere] = []

    def run(app: App) -> Elsewhere:
        made.append(Elsewhere(app))
        return made[-1]

    yield run
    for each in made:
        each.close()


async def asked() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


async def hello(scope: Any, receive: Any, send: Any) -> None:
    body = (await receive())["body"]
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"x-thread", threading.current_thread().name.encode())]}
    )
    for _ in range(3 * AHEAD):
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b"."})


async def test_it_answers_as_before(running: Any) -> None:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=running(hello)), base_url="http://app.test") as http:
        responses = await asyncio.gather(*(http.post("/", content=f"{number},") for number in range(20)))
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
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=running(blocking)), base_url="http://app.test") as http:
        await http.post("/", content="x")
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
