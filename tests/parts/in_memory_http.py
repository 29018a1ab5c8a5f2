"""A client's connection to an app of the gateway, over the gateway's own listener: all of it real but the socket.

Each request has a connection of its own, which ends with its answer, or when the client closes that.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import h11
import httpx2

from lacre_gateway.http.connection import GatewayConnection
from lacre_gateway.http.server import Server, make_server
from lacre_gateway.settings import Listen

RawHeaders = list[tuple[bytes, bytes]]


class MemoryTransport(asyncio.Transport):
    """The server's end of a connection. told: gets what is written. ended: once it is closed; broken: by an abort.
    half_closed: once the server has said that it writes nothing more.
    """

    def __init__(self, peer: tuple[str, int], told: Callable[[bytes], None]) -> None:
        super().__init__({"peername": peer, "sockname": ("192.0.2.80", 80)})
        self._told = told
        self._loop = asyncio.get_running_loop()
        self.reading = asyncio.Event()
        self.reading.set()
        self.ended = self.broken = self.half_closed = False
        self.protocol: asyncio.Protocol | None = None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self.ended:
            self._told(bytes(data))

    def pause_reading(self) -> None:
        self.reading.clear()

    def resume_reading(self) -> None:
        self.reading.set()

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.half_closed = True

    def is_closing(self) -> bool:
        return self.ended

    def close(self) -> None:
        if not self.ended:
            self.ended = True
            self.reading.set()
            self._loop.call_soon(self._lose)

    def abort(self) -> None:
        self.broken = self.broken or not self.ended
        self.close()

    def _lose(self) -> None:
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            protocol.connection_lost(None)
        self._told(b"")

    def hang_up(self) -> None:
        """What the client does."""
        self.close()


class Connection:
    """One connection. news: what came from the server; b"" at its end."""

    def __init__(self, protocol: GatewayConnection, address: str) -> None:
        self.news: asyncio.Queue[bytes] = asyncio.Queue()
        self.transport = MemoryTransport((address, 40000), self.news.put_nowait)
        self.transport.protocol = self._protocol = protocol
        protocol.connection_made(self.transport)

    async def say(self, data: bytes) -> bool:
        """Sends it when the server reads. Whether the connection is still open."""
        await self.transport.reading.wait()
        if not self.transport.ended:
            self._protocol.data_received(data)
        return not self.transport.ended


class InMemoryHttp(httpx2.AsyncBaseTransport):
    """address: the client's."""

    def __init__(self, app: Any, address: str = "127.0.0.1") -> None:
        self._server: Server = make_server(app, Listen(port=0))
        self._address = address

    def fields(self, request: httpx2.Request) -> RawHeaders:
        """As they are sent."""
        return list(request.headers.raw)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        fields = [(name.lower(), value) for name, value in self.fields(request)]
        connection = Connection(self._server.connection(), self._address)
        answer = _Answer(connection, request.method.encode())
        answer.sending = asyncio.create_task(_send(connection, request, fields))
        try:
            head = await answer.head()
        except BaseException:
            await answer.aclose()
            raise
        return httpx2.Response(head.status_code, headers=head.headers.raw_items(), stream=answer)


async def _send(connection: Connection, request: httpx2.Request, fields: RawHeaders) -> None:
    lines = b"".join(b"%b: %b\r\n" % field for field in fields)
    chunked = any(name == b"transfer-encoding" for name, _ in fields)
    said = request.method.encode() + b" " + request.url.raw_path + b" HTTP/1.1\r\n" + lines + b"\r\n"
    assert isinstance(request.stream, httpx2.AsyncByteStream)
    async for piece in request.stream:
        said += b"%x\r\n%b\r\n" % (len(piece), piece) if chunked and piece else piece
        if not await connection.say(said):
            return
        said = b""
        await asyncio.sleep(0)
    if chunked:
        said += b"0\r\n\r\n"
    if said:
        await connection.say(said)


class _Answer(httpx2.AsyncByteStream):
    """Reads one answer. sending: sends the request meanwhile."""

    sending: asyncio.Task[None]

    def __init__(self, connection: Connection, method: bytes) -> None:
        self._connection = connection
        self._reader = h11.Connection(h11.CLIENT)
        self._reader.send(h11.Request(method=method, target=b"/", headers=[(b"host", b"x")]))
        self._reader.send(h11.EndOfMessage())

    async def head(self) -> h11.Response:
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                return event

    async def _next(self) -> h11.Event:
        try:
            while (event := self._reader.next_event()) is h11.NEED_DATA:
                data = await self._connection.news.get()
                if not data and self._connection.transport.broken:
                    raise httpx2.ReadError("the connection broke")
                self._reader.receive_data(data)
        except h11.RemoteProtocolError as exc:
            raise httpx2.RemoteProtocolError(str(exc)) from exc
        if isinstance(event, h11.ConnectionClosed):
            raise httpx2.RemoteProtocolError("the server closed the connection without an answer")
        assert not isinstance(event, type)
        return event

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)

    async def aclose(self) -> None:
        self._connection.transport.hang_up()
        self.sending.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.sending
