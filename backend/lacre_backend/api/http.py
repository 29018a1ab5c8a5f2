"""Reads a request's body and writes a response, in bare ASGI, and notices when the client disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from lacre.asgi import Disconnected, Receive, Scope, Send
from lacre.runtime import tasks
from lacre_backend.api.errors import RequestRefused

MAX_HEADER: Final = 256  # bytes of a header of ours


def header(scope: Scope, name: bytes) -> bytes | None:
    """A header's value. Refuses a header that is too long or repeated."""
    values = [value for key, value in scope["headers"] if key.lower() == name]
    if not values:
        return None
    if len(values) > 1 or len(values[0]) > MAX_HEADER:
        raise RequestRefused(f"The header {name.decode()} is repeated, or longer than {MAX_HEADER} bytes.")
    return bytes(values[0])


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole body, at most `limit` bytes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected("the caller left before its request was complete")
        piece = message.get("body", b"")
        if len(body) + len(piece) > limit:
            raise RequestRefused(f"The request body is larger than {limit} bytes.", status=413, code="request_too_large")
        body += piece
        if not message.get("more_body", False):
            return bytes(body)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, and cancels it when the client leaves. Raises Disconnected if `work` notices that first, as it sends."""
    task = tasks.spawn("api call", work)
    watcher = tasks.spawn("client's departure", _disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        await tasks.end(task, watcher, expected=(Disconnected, RequestRefused))


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def encode(document: Any) -> bytes:
    try:
        return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # a lone surrogate from an upstream: it stays escaped
        return json.dumps(document, separators=(",", ":")).encode()


async def send_json(send: Send, status: int, document: Any) -> None:
    body = encode(document)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class EventStream:
    """A `text/event-stream` response. Each event is one ASGI message, so that it is sealed and sent as soon as it is made."""

    def __init__(self, send: Send, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """headers: of the response, in addition to its own."""
        self._send = send
        self._headers = headers
        self.started = False

    async def start(self) -> None:
        """Sends the head."""
        self.started = True
        own = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await self._send({"type": "http.response.start", "status": 200, "headers": [*own, *self._headers]})

    async def event(self, document: Any, mark: str | None = None, name: str | None = None) -> None:
        """mark: the event's `id`, which records how far the answer has come. name: its `event`."""
        if not self.started:
            await self.start()
        identified = b"" if mark is None else b"id: " + mark.encode() + b"\n"
        await self._body(identified + _event(document, name), more=True)

    async def done(self, end_mark: bytes = b"data: [DONE]\n\n") -> None:
        await self._body(end_mark, more=False)

    async def broken(self, document: Any, name: str | None = None) -> None:
        """Sends an error instead of the rest. Clients raise it; there is no `[DONE]`."""
        await self._body(_event(document, name), more=False)

    async def _body(self, body: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _event(document: Any, name: str | None) -> bytes:
    named = b"" if name is None else b"event: " + name.encode() + b"\n"
    return named + b"data: " + encode(document) + b"\n\n"
