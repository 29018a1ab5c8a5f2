"""A caller that asks and does not read: what it leaves behind, in a service behind the seal and in a worker."""

from __future__ import annotations

import asyncio
import email.utils
import time

from hostile.attacks import attack
from lacre.asgi import Message, Receive, Scope, Sealed, Send
from lacre.asgi.app_call import MAX_PENDING
from lacre.wire import bhttp
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey
from parts.frames import frames_of
from parts.keys import NOW
from parts.stage import Stage, running, until
from parts.told_app import App

BY_LIMITS = "an app can end while its message queue is full, within a time limit"
TIMES = 5


class Flood:
    """The application: an answer without an end."""

    def __init__(self) -> None:
        self.begun = self.ended = self.sent = 0

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await self.pour(send)

    async def pour(self, send: Send) -> None:
        self.begun += 1
        try:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
            while True:
                await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
                self.sent += 1
        finally:
            self.ended += 1


@attack("ask a sealed service for streams again and again, read nothing and hang up", "client", BY_LIMITS)
async def test_stalled_at_a_service() -> None:
    app, key = Flood(), PrivateKey.generate(1)
    sealed = Sealed(app, keys=key)

    async def visit() -> None:
        headers = (("date", email.utils.formatdate(time.time() + 1, usegmt=True)), ("lacre-shape", "none"))
        body, _, _ = seal_request(key.config, bhttp.encode_request(bhttp.Request("POST", "https", "a.invalid", "/", headers)))
        asked, gone = iter([{"type": "http.request", "body": body}]), asyncio.Event()

        async def receive() -> Message:
            if (message := next(asked, None)) is None:
                await gone.wait()
                return {"type": "http.disconnect"}
            return message

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()  # the connection takes no more

        scope = {"type": "http", "method": "POST", "path": "/.well-known/ohttp-gateway", "headers": [
            (b"content-type", b"message/ohttp-chunked-req")]}  # fmt: skip
        visiting = asyncio.create_task(sealed(scope, receive, send))
        before = app.sent
        await until(lambda: app.sent >= before + MAX_PENDING - 1)
        gone.set()
        async with asyncio.timeout(3):
            await visiting

    for _ in range(TIMES):
        await visit()
    assert app.begun == app.ended == TIMES


@attack("ask a worker for streams again and again, read one frame and leave, until its slots are gone", "client", BY_LIMITS,
        cases=["the reader leaves", "the worker drains"])  # fmt: skip
async def test_stalled_at_a_worker(case: str) -> None:
    flood, app = Flood(), App()

    async def answer(receive: Receive, send: Send, _call: object) -> None:
        await receive()
        await flood.pour(send)

    app.answer = answer
    stage = Stage(now=NOW)
    node = stage.node(app)
    async with running(node):
        [worker] = stage.hub.live
        for _ in range(TIMES if case == "the reader leaves" else 1):
            before = flood.sent
            frames = frames_of(await stage.dispatch(stage.seal()))
            await anext(frames)
            await until(lambda before=before: flood.sent >= before + MAX_PENDING)  # type: ignore[misc]
            settled = -1
            while flood.sent != settled:
                settled = flood.sent
                await asyncio.sleep(0.02)
            if case == "the worker drains":
                async with asyncio.timeout(3):
                    await node.drain(0.0)
            await frames.aclose()
            await until(lambda: worker.slots.busy == 0)
    assert flood.begun == flood.ended
