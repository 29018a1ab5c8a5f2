"""What stands behind a worker: a real HTTP server on a loopback port that does as it is told, and a call of the app in front of
it, whose request was really sealed and opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from lacre import asgi
from lacre.wire import bhttp
from lacre.wire.header import Kem
from lacre.wire.ohttp import ResponseOpener, seal_request
from lacre.wire.opening import PrivateKey
from parts.live import whole_body

Respond = Callable[[Any, bytes, asgi.Send], Awaitable[None]]


@dataclass
class Server:
    """respond: what it does with a request and its body. seen: the scopes of those that came, bodies their content."""

    respond: Respond
    url: str = ""
    seen: list[Any] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = await whole_body(receive)
        self.seen.append(scope)
        self.bodies.append(body)
        answering = asyncio.create_task(self.respond(scope, self.bodies[-1], send))
        gone = asyncio.create_task(self._gone(receive))
        await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        answering.cancel()
        await asyncio.gather(answering, gone, return_exceptions=True)

    async def _gone(self, receive: Any) -> None:
        """Until the client hangs up."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()

    @property
    def headers(self) -> dict[str, str]:
        """Of the last request."""
        return {name.decode(): value.decode() for name, value in self.seen[-1]["headers"]}


@contextlib.asynccontextmanager
async def serving(respond: Respond) -> AsyncIterator[Server]:
    """Without uvicorn's own loop, which looks ten times a second whether it should end: there are many short ones here."""
    server = Server(respond)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(
            server, lifespan="off", ws="none", log_config=None, timeout_graceful_shutdown=1, date_header=False
        )
        config.load()
        running = uvicorn.Server(config)
        running.lifespan = config.lifespan_class(config)
        server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        await running.startup([listener])
        try:
            yield server
        finally:
            await running.shutdown([listener])
            for connection in list(running.server_state.connections):  # whose client was still there after a second
                connection.transport.abort()
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def saying(answer: bytes, port: int = 0) -> AsyncIterator[int]:
    """A program that answers every request with these bytes and hangs up. Its port."""
    served: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        with contextlib.suppress(OSError):
            await reader.read(4096)
            writer.write(answer)
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", port) as listening:
        yield listening.sockets[0].getsockname()[1]
        await asyncio.sleep(0.02)
        await asyncio.gather(*(task for task in served if task))


def answering(status: int, headers: Sequence[tuple[str, str]], *pieces: bytes) -> Respond:
    """Each piece by itself."""

    async def respond(_scope: Any, _body: bytes, send: asgi.Send) -> None:
        raw = [(name.encode(), value.encode()) for name, value in headers]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return respond


@dataclass
class Answered:
    """What the client opened. pieces: of the body, one for each record that held some."""

    status: int
    headers: dict[str, str]
    pieces: list[bytes]

    @property
    def content(self) -> bytes:
        return b"".join(self.pieces)


async def ask(
    app: asgi.App, call: asgi.Call, method: str, path: str, content: bytes = b"", headers: Sequence[tuple[str, str]] = ()
) -> Answered:
    """Raises AppFailed where the answer breaks off."""
    answered: list[Answered] = []
    async with aclosing(opened(app, call, method, path, content, headers)) as events:
        async for event in events:
            if isinstance(event, bhttp.ResponseHead):
                answered.append(Answered(event.status, dict(event.headers), []))
            elif isinstance(event, bhttp.Data):
                answered[0].pieces.append(event.content)
    return answered[0]


async def opened(
    app: asgi.App, call: asgi.Call, method: str, path: str, content: bytes = b"", headers: Sequence[tuple[str, str]] = ()
) -> AsyncIterator[bhttp.Event]:
    """The answer's events, as each record opens. Closing it is the client's leaving."""
    key = PrivateKey.generate(1, Kem.X25519)
    inner = bhttp.Request(method, asgi.SCHEME, asgi.AUTHORITY, path, tuple(headers), content)
    sealed, _, opener = seal_request(key.config, bhttp.encode_request(inner))
    decoder = bhttp.ResponseDecoder()
    async with aclosing(asgi.answer(app, asgi.open_sealed(sealed, {1: key}), call, shape="none")) as records:
        async for record in records:
            for event in _events(opener, decoder, record):
                yield event
    for event in [event for rest in opener.close() for event in decoder.feed(rest)] + decoder.close():
        yield event


def _events(opener: ResponseOpener, decoder: bhttp.ResponseDecoder, record: bytes) -> list[bhttp.Event]:
    return [event for plain in opener.feed(record) for event in decoder.feed(plain)]
