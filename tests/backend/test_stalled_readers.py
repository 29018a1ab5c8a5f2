"""Readers that stall and leave: the node's slot is free again, and its drain ends, whatever the app still does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import closing, nullcontext
from typing import Any

import pytest

from lacre.asgi import Call, Disconnected, Message, Receive, Send
from lacre.asgi.app_call import MAX_PENDING
from lacre_backend.api.http import until_disconnect
from lacre_backend.app_thread import Elsewhere
from lacre_fabric.work.frames import Frame
from parts.frames import frames_of
from parts.keys import NOW
from parts.stage import Stage, running, until
from parts.told_app import STREAM, App

PATIENCE = 20.0  # seconds; nothing here takes long, but on a busy machine
PIECE = b"data: " + b"x" * 900 + b"\n\n"


class Flood(App):
    """Sends far more than a reader's credit allows."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.answer = self.flood

    async def flood(self, receive: Receive, send: Send, _call: Call) -> None:
        await receive()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            while True:
                await send({"type": "http.response.body", "body": PIECE, "more_body": True})
                self.sent += 1
        finally:
            self.left.set()


@pytest.fixture(params=["on the node's loop", "in a thread of its own"])
def app(request: pytest.FixtureRequest) -> Iterator[tuple[Flood, Any]]:
    """What floods, and the app through which the node calls it."""
    flood = Flood()
    with closing(Elsewhere(flood)) if "thread" in request.param else nullcontext(flood) as called:
        yield flood, called


async def stalled(stage: Stage, app: Flood) -> AsyncGenerator[Frame, None]:
    """A request whose reader takes one frame, and no more. Returns when the worker may send nothing any more."""
    frames = frames_of(await stage.dispatch(stage.seal()))
    await anext(frames)
    await until(lambda: app.sent > MAX_PENDING, PATIENCE)
    before = -1
    while app.sent != before:
        before = app.sent
        await asyncio.sleep(0.02)
    return frames


async def test_a_reader_that_leaves_frees_its_slot(app: tuple[Flood, Any]) -> None:
    flood, called = app
    stage = Stage(now=NOW)
    async with running(stage.node(called)):
        frames = await stalled(stage, flood)
        [worker] = stage.hub.live
        assert worker.slots.busy == 1
        await frames.aclose()
        await until(lambda: worker.slots.busy == 0 and flood.left.is_set(), PATIENCE)


async def test_a_drain_ends_while_a_reader_stalls(app: tuple[Flood, Any]) -> None:
    flood, called = app
    stage = Stage(now=NOW)
    async with running(node := stage.node(called)):
        frames = await stalled(stage, flood)
        async with asyncio.timeout(PATIENCE):
            await node.drain(0.0)
        await until(flood.left.is_set, PATIENCE)
        await frames.aclose()


async def test_a_failure_of_the_nodes_own_ends_its_request_aloud(caplog: pytest.LogCaptureFixture) -> None:
    """Who waits is told, the slot is free, and the log has it."""
    stage = Stage(now=NOW)

    def fails() -> bool:
        raise ZeroDivisionError

    stage.look_for_keys = fails
    async with running(stage.node(App())):
        sealed = stage.seal()
        stage.held.clear()
        answer = await stage.ask(sealed)
        assert answer.problem is not None and answer.problem.endswith("internal")
        [worker] = stage.hub.live
        await until(lambda: worker.slots.busy == 0)
    assert caplog.messages == ["task failed: request"]


@pytest.mark.parametrize("first", ["the watcher", "the call"])
async def test_a_call_that_finds_its_caller_gone_has_not_failed(first: str, caplog: pytest.LogCaptureFixture) -> None:
    leaves = asyncio.Event()

    async def receive() -> Message:
        await leaves.wait()
        return {"type": "http.disconnect"}

    async def call() -> None:
        try:
            if first == "the watcher":
                leaves.set()
                await asyncio.Event().wait()
        finally:
            raise Disconnected("the caller has gone")

    if first == "the watcher":
        await until_disconnect(receive, call())
    else:
        with pytest.raises(Disconnected):
            await until_disconnect(receive, call())
    assert not caplog.records
