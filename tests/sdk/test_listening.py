"""The bounded listener over real sockets, with apps of a few lines: what it reads, and for how long it waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import pytest
import uvicorn

from lacre.runtime.listening import AHEAD, DISCARDED, BoundedConfig, BoundedProtocol, Door, network_of

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
pytestmark = pytest.mark.timeout(30)  # a server that waits where it should not


async def answer(send: Send, body: bytes = b"ok") -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


async def deaf(_scope: object, _receive: Receive, send: Send) -> None:
    """Answers without a look at the body."""
    await answer(send)


async def reading(_scope: object, receive: Receive, send: Send) -> None:
    """Answers with the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message.get("body", b"")), message.get("more_body", False)
    await answer(send, str(size).encode())


@dataclass(frozen=True)
class Served:
    server: uvicorn.Server
    port: int
    door: Door

    async def dial(self, said: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(said)
        return reader, writer

    async def whole(self, said: bytes) -> bytes:
        """All that comes back until the server ends the connection."""
        reader, writer = await self.dial(said)
        told = await reader.read()
        writer.close()
        return told


@contextlib.asynccontextmanager
async def served(app: App, **door: Any) -> AsyncIterator[Served]:
    entrance = Door(**door)
    config = BoundedConfig(app, entrance, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    loop = asyncio.get_running_loop()

    def connection() -> BoundedProtocol:
        return BoundedProtocol(config, server.server_state, {}, loop)

    listener = await loop.create_server(connection, "127.0.0.1", 0)
    try:
        yield Served(server, listener.sockets[0].getsockname()[1], entrance)
    finally:
        for each in list(server.server_state.connections):
            each.transport.abort()  # type: ignore[union-attr]
        listener.close()
        await listener.wait_closed()
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 300000\r\n\r\n%b", b"Transfer-Encoding: chunked\r\n\r\n493e0\r\n%b\r\n0\r\n\r\n"]
)
async def test_a_long_body_and_the_next_request(framing: bytes) -> None:
    async with served(reading) as at:
        said = b"POST / HTTP/1.1\r\nHost: x\r\n" + framing.replace(b"%b", bytes(300_000))
        told = await at.whole(said + said + GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert [part.rpartition(b"\r\n")[2] for part in told.split(b"HTTP/1.1 ")[1:]] == [b"300000", b"300000", b"0"]


async def test_what_nobody_asks_for_yet_stays_in_the_network() -> None:
    """A body before its app reads it; and the requests behind one under way."""
    asked, size = asyncio.Event(), 8 * 2**20

    async def app(_scope: object, receive: Receive, send: Send) -> None:
        await asked.wait()
        await reading(_scope, receive, send)

    async with served(app) as at:
        reader, writer = await at.dial(b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % size)
        writer.write(bytes(size))
        assert 0 < await most_held(at) < 2**19
        asked.set()
        assert (await reader.read()).endswith(b"\r\n\r\n8388608")
        assert at.door.held_now == 0
        writer.close()
        asked.clear()
        _reader, writer = await at.dial(GET * (4 * 2**20 // len(GET)))
        assert await most_held(at) <= AHEAD + 2**18
        assert len(at.server.server_state.tasks) == 1
        writer.transport.abort()
        asked.set()


async def most_held(at: Served) -> int:
    """Within a while."""
    most = 0
    for _ in range(50):
        await asyncio.sleep(0.002)
        most = max(most, at.door.held_now)
    return most


async def test_a_body_that_is_not_read_has_an_end() -> None:
    """The answer is there at once, and a client that goes on sending is cut off."""
    async with served(deaf) as at:
        reader, writer = await at.dial(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
        assert await reader.readexactly(15) == b"HTTP/1.1 200 OK"
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 64 * DISCARDED:
                writer.write(bytes(65536))
                await writer.drain()
                sent += 65536
        assert sent < 64 * DISCARDED
        writer.transport.abort()


@pytest.mark.parametrize("close", [b"", b"Connection: close\r\n"])
async def test_an_answer_that_nobody_reads(close: bytes) -> None:
    async def app(_scope: object, _receive: Receive, send: Send) -> None:
        await answer(send, bytes(32 * 2**20))

    async with served(app, stalled=0.3) as at:
        reader, writer = await at.dial(b"GET / HTTP/1.1\r\nHost: x\r\n" + close + b"\r\n")
        reader._transport.pause_reading()  # type: ignore[attr-defined]
        for there in (True, False):
            while bool(at.server.server_state.connections) is not there:
                await asyncio.sleep(0.01)
        writer.transport.abort()


async def test_upgrades_are_answered_as_what_they_are() -> None:
    upgrade = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    async with served(deaf) as at:
        told = await at.whole(upgrade + b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 200 OK") and b"HTTP/1.1 505 " in told


async def test_an_error_behind_a_request_under_way_does_not_answer_it() -> None:
    """Nobody may take a bare status for the answer that is still to come."""
    done = asyncio.Event()

    async def app(_scope: object, receive: Receive, send: Send) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        done.set()

    async with served(app) as at:
        assert await at.whole(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n") == b""
        await done.wait()


def test_whom_an_address_stands_for() -> None:
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff%eth0") != network_of("2001:db8:0:1::1")
    assert network_of("::ffff:192.0.2.1") == network_of("192.0.2.1") == "192.0.2.1"
    assert network_of("no address") == "no address"


async def test_a_trusted_proxy_has_no_limit_of_its_own() -> None:
    async with served(deaf, per_address=1, free=("127.0.0.0/8",)) as at:
        crowd = [await at.dial(GET) for _ in range(5)]
        for reader, writer in crowd:
            assert await reader.readexactly(15) == b"HTTP/1.1 200 OK"
            writer.close()
        assert at.door.cut == 0
