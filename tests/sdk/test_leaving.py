"""Readers that leave: nothing of a sealed answer outlives its reader, whatever the app does."""

from __future__ import annotations

import asyncio
import email.utils
from collections.abc import AsyncGenerator

import pytest

from lacre.asgi import App, AppFailed, Call, Receive, Scope, Send, answer, open_sealed
from lacre.asgi.app_call import MAX_PENDING
from lacre.wire import bhttp
from lacre.wire.ohttp import seal_request
from lacre.wire.opening import PrivateKey

KEY = PrivateKey.generate(1)
PATIENCE = 20.0  # seconds; nothing here takes long, but on a busy machine
STREAM = [(b"content-type", b"text/event-stream")]


class Flood:
    """An app that sends without an end. cleanup: how it behaves once it is cancelled."""

    def __init__(self, cleanup: str = "") -> None:
        self.cleanup = cleanup
        self.sent = 0
        self.ended = asyncio.Event()
        self.error: BaseException | None = None

    async def __call__(self, _scope: Scope, _receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": STREAM})
            while True:
                try:
                    await send({"type": "http.response.body", "body": b"data: " + b"x" * 900 + b"\n\n", "more_body": True})
                    self.sent += 1
                except asyncio.CancelledError:
                    if self.cleanup != "goes on sending":
                        raise
        except BaseException as exc:
            self.error = exc
            if self.cleanup == "waits a little":
                await asyncio.sleep(0.05)
            if self.cleanup == "fails":
                raise ZeroDivisionError from exc
            raise
        finally:
            self.ended.set()


def answered(app: App) -> AsyncGenerator[bytes]:
    request = bhttp.Request("POST", "https", "lacre.invalid", "/x", (("date", email.utils.formatdate(usegmt=True)),))
    opened = open_sealed(seal_request(KEY.config, bhttp.encode_request(request))[0], {1: KEY})
    return answer(app, opened, Call("r"), shape="none")


async def far_ahead(app: Flood) -> None:
    """Until it is as far ahead as it may be."""
    before = -1
    while app.sent != before:
        before = app.sent
        await asyncio.sleep(0.01)


def of_ours() -> list[str]:
    return sorted(task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith(("sealed", "caller")))


@pytest.mark.parametrize("cleanup", ["", "waits a little", "goes on sending", "fails"])
@pytest.mark.parametrize("reads", [0, 1, 2, MAX_PENDING, 2 * MAX_PENDING])
async def test_a_reader_may_leave_at_any_record(reads: int, cleanup: str, caplog: pytest.LogCaptureFixture) -> None:
    """The queue between app and sealing is full then, and whoever left takes nothing any more."""
    app = Flood(cleanup)
    pieces = answered(app)
    for _ in range(reads):
        await anext(pieces)
    if reads:
        await far_ahead(app)
        assert reads <= app.sent + 1 <= reads + MAX_PENDING + 1
    async with asyncio.timeout(PATIENCE):
        await pieces.aclose()
    await asyncio.sleep(0)
    assert of_ours() == []
    if reads:
        assert app.ended.is_set()
        assert isinstance(app.error, OSError if cleanup == "goes on sending" else asyncio.CancelledError)  # ASGI 2.4
        assert caplog.messages == (["task failed: sealed app"] if cleanup == "fails" else [])


@pytest.mark.slow
async def test_an_app_that_does_not_end_holds_nobody_up(caplog: pytest.LogCaptureFixture) -> None:
    let_go = asyncio.Event()

    async def stubborn(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue

    pieces = answered(stubborn)
    await anext(pieces)
    await pieces.aclose()
    assert caplog.messages == ["task does not end: sealed app"]
    let_go.set()


async def test_the_end_of_an_app_that_fails_far_ahead_of_its_reader() -> None:
    """Everything that it sent comes first."""

    async def fails(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": STREAM})
        for _ in range(MAX_PENDING - 1):
            await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        raise ZeroDivisionError

    pieces = answered(fails)
    for _ in range(MAX_PENDING):
        await anext(pieces)
    with pytest.raises(AppFailed):
        await anext(pieces)
