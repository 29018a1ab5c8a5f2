"""What users of httpx2 expect of a sealed client: limits, cancelling, cookies. `test_client` has what httpx's does too."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import get_type_hints

import httpx2
import pytest

import lacre
from lacre.transport.options import AsyncOptions, Options
from parts.chat_app import ChatApp, reply
from parts.relay import SEALED, Relay, connect_async

STREAM = {"messages": [{"role": "user", "content": "x"}], "stream": True}
CHAT = "/v1/chat/completions"


class Stalling(httpx2.AsyncByteStream):
    """The first pieces of a body; then nothing, until it is closed."""

    def __init__(self, stream: httpx2.AsyncByteStream, pieces: int) -> None:
        self.stream, self.pieces = stream, pieces
        self.waits, self.closed = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        left = self.pieces
        async for piece in self.stream:
            if left == 0:
                self.waits.set()
                await self.closed.wait()
                return
            left -= 1
            yield piece

    async def aclose(self) -> None:
        self.closed.set()


class StallingWire(httpx2.AsyncBaseTransport):
    """The connection to a relay whose answers stop coming."""

    def __init__(self, relay: Relay, pieces: int) -> None:
        self.relay, self.pieces = relay, pieces
        self.body: asyncio.Future[Stalling] = asyncio.get_running_loop().create_future()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        response = await self.relay.answer(request)
        if request.url.path == SEALED:
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = Stalling(response.stream, self.pieces)
            self.body.set_result(response.stream)
        return response


@pytest.mark.parametrize("pieces", [3, 0], ids=["within the answer", "before it"])
async def test_a_cancelled_task_lets_go_of_the_connection(relay: Relay, pieces: int) -> None:
    wire = StallingWire(relay, pieces)
    async with connect_async(relay, transport=wire) as client:

        async def read() -> None:
            async with client.stream("POST", CHAT, json=STREAM) as response:
                await response.aread()

        task = asyncio.create_task(read())
        body = await wire.body
        await body.waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert body.closed.is_set()


async def test_a_stream_left_early_is_closed(relay: Relay) -> None:
    wire = StallingWire(relay, 3)
    async with connect_async(relay, transport=wire) as client:
        async with client.stream("POST", CHAT, json=STREAM):
            pass
        assert (await wire.body).closed.is_set()


async def test_a_real_timeout_is_both_kinds() -> None:
    """Nobody answers: the connection is taken, and read until its end."""

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        gone.set()

    gone = asyncio.Event()
    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    url = Relay(ChatApp()).url.replace(":9?", f":{server.sockets[0].getsockname()[1]}?")
    async with server, lacre.AsyncClient(url, token="t", memory=lacre.VersionMemory(), timeout=0.2) as client:
        with pytest.raises(lacre.NetworkError) as caught:
            async with asyncio.timeout(30):
                await client.post(CHAT, json=STREAM, timeout=0.2)
        await gone.wait()
    assert isinstance(caught.value, httpx2.TimeoutException)


def test_limits_are_of_the_connection_to_the_gateway(relay: Relay) -> None:
    limits = httpx2.Limits(max_connections=1)
    with lacre.Client(relay.url, token="t", memory=lacre.VersionMemory(), limits=limits) as client:
        assert client._sealed._link.outer.get()._transport._pool._max_connections == 1  # type: ignore[attr-defined]


async def test_cookies_of_an_answer_stay_outside_the_seal(async_client: lacre.AsyncClient, relay: Relay) -> None:
    async def sets_one(scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        assert not [value for name, value in scope["headers"] if name == b"cookie"]
        await reply(send, 200, {"ok": True})

    relay.app = sets_one
    async_client.cookies.set("session", "c00kie")
    async with async_client.stream("GET", "/v1/models") as response:
        assert response.status_code == 200


@pytest.mark.parametrize(("kind", "options"), [(lacre.Client, Options), (lacre.AsyncClient, AsyncOptions)])
def test_the_options_are_the_clients_parameters(kind: type, options: type) -> None:
    """Less what the adapters name themselves."""
    taken = set(inspect.signature(kind).parameters) - {"url", "timeout", "event_hooks"}
    assert set(get_type_hints(options)) == taken
