"""A stranger: what anybody may send to a port of an honest gateway, before anybody knows who it is."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from hostile.attacks import Verdict, attack
from lacre import problems
from lacre.runtime.http1 import MAX_HEAD, UnreadableRequest
from lacre.wire.bhttp import encode_request
from lacre.wire.header import MEDIA_TYPE_REQUEST
from lacre.wire.ohttp import seal_request
from lacre_gateway.http.server import Server, bind, make_server
from lacre_gateway.settings import Listen
from parts.keys import MODEL
from parts.stage import Stage

from .adversary import inner

OUTER = (
    f"Content-Type: {MEDIA_TYPE_REQUEST}\r\nLacre-Pool: default\r\nLacre-Model: {MODEL}\r\nLacre-Action: chat\r\n"
    "Lacre-Max-Tokens: 512\r\nLacre-Shape: none\r\n"
).encode()
POST = b"POST /v1/sealed HTTP/1.1\r\nHost: x\r\n"
HEAD_TIMEOUT = 3.0  # seconds; what is refused is refused much sooner


@dataclass(frozen=True)
class Port:
    """An honest gateway's port. server: what holds it."""

    server: Server
    number: int

    @property
    def held(self) -> int:
        return self.server.config.door.held_now  # type: ignore[attr-defined, no-any-return]

    async def dial(self, said: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.number)
        writer.write(said)
        return reader, writer

    async def told(self, said: bytes) -> bytes:
        """All that comes back. Raises UnreadableRequest where it is a bare status, and the end of the connection."""
        reader, writer = await self.dial(said)
        try:
            async with asyncio.timeout(20):
                answer = await reader.read()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        if bare := BARE.fullmatch(answer):
            raise UnreadableRequest(int(bare[1]), "a bare status, and the end")
        return answer


# A status, and at most one fixed line of what is wrong.
BARE = re.compile(
    rb"HTTP/1.1 (\d+) [ -~]+\r\n(?:content-type: text/plain\r\n)?content-length: \d+\r\nconnection: close\r\n\r\n(?:[ -~]+\n)?"
)


@contextlib.asynccontextmanager
async def opened(
    honest: Stage, app: ASGIApp | None = None, context: ssl.SSLContext | None = None, **listen: float
) -> AsyncIterator[Port]:
    settings = Listen(port=0, drain=1, header_timeout=HEAD_TIMEOUT, **listen)  # type: ignore[arg-type]
    with bind(settings) as listener:
        server = make_server(app or honest.app, settings, context)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield Port(server, listener.getsockname()[1])
        finally:
            server.should_exit = True
            await serving
            await server.settle()


@pytest.fixture
async def port(honest: Stage) -> AsyncIterator[Port]:
    async with opened(honest) as port:
        yield port


def problem_of(answer: bytes) -> str | None:
    return problems.Problem.type_in(answer.rpartition(b"\r\n\r\n")[2])


async def refused(port: Port, verdict: Verdict, said: bytes, status: int) -> None:
    with verdict.refused() as caught:
        await port.told(said)
    assert caught.value.status == status  # type: ignore[attr-defined]


@attack("send a request's head without an end", "stranger", "a head has 64 KiB, counted before it is kept", UnreadableRequest)
@pytest.mark.parametrize(
    "begun", [POST + b"a: ", b"GET /", POST, b"\r\n"], ids=["a field", "a target", "fields", "empty lines"]
)
async def test_endless(port: Port, verdict: Verdict, begun: bytes) -> None:
    more = {POST: b"a: b\r\n", b"\r\n": b"\r\n"}.get(begun, b"x")
    await refused(port, verdict, begun + more * (4 * MAX_HEAD // len(more)), 414 if begun == b"GET /" else 431)
    assert port.held == 0


@attack("send a head of thousands of fields", "stranger", "a head has 100 fields", UnreadableRequest)
async def test_fields(port: Port, verdict: Verdict) -> None:
    await refused(port, verdict, POST + b"a:b\r\n" * 10_000 + b"\r\n", 431)


@attack("send many incomplete heads at once", "stranger",
        "bytes that no app asked for are bounded over all connections; the longest holder is cut off",
        gain="that its own older connections end")  # fmt: skip
async def test_held(honest: Stage) -> None:
    async with opened(honest, held_bytes=2**20) as port:
        crowd = [await port.dial(POST + b"a: " + b"x" * 60_000) for _ in range(40)]
        for _ in range(200):
            await asyncio.sleep(0.005)
            assert port.held <= 2**20
            if sum(reader.at_eof() or reader.exception() is not None for reader, _ in crowd) >= 40 - 2**20 // 60_000:
                break
        else:
            pytest.fail("nobody was cut off")
        assert (await port.told(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")
        for _, writer in crowd:
            writer.close()


@attack("hold all connections from one address", "stranger",
        "an address has a bounded number of connections, and its own oldest idle one makes room",
        gain="that its own older connections end")  # fmt: skip
async def test_one_address(honest: Stage) -> None:
    async with opened(honest, connections_per_address=3) as port:
        crowd = [await port.dial(b"GET /") for _ in range(6)]
        async with asyncio.timeout(10):
            while len(port.server.server_state.connections) != 3:
                await asyncio.sleep(0.005)
        for _, writer in crowd:
            writer.close()


@attack("hold connections whose TLS handshake never ends", "stranger",
        "a handshake counts as a connection, in total and for its address; the oldest makes room",
        gain="that its own older connections end")  # fmt: skip
@pytest.mark.parametrize("limit", ["connections", "connections_per_address"])
async def test_handshakes(honest: Stage, limit: str) -> None:
    async with opened(honest, context=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), **{limit: 3}) as port:
        crowd = [await port.dial(b"\x16\x03") for _ in range(6)]
        async with asyncio.timeout(HEAD_TIMEOUT * 0.8):  # before time would end them
            for reader, _ in crowd[:3]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        assert port.server.config.door.inside == 3  # type: ignore[attr-defined]
        for _, writer in crowd:
            writer.close()


@attack("authenticate with a token in the trailers, behind the body", "stranger",
        "a request's fields are those of its head; trailers are dropped", problems.INVALID_TOKEN)  # fmt: skip
async def test_trailer(stage: Stage, honest: Stage, port: Port, verdict: Verdict) -> None:
    worker = await stage.worker()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner()))
    body = b"%x\r\n%b\r\n0\r\nAuthorization: Bearer %b\r\n\r\n" % (len(sealed), sealed, honest.token.encode())
    verdict.said(problem_of(await port.told(POST + OUTER + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + body)))
    assert worker.calls == 0


@attack("hide a second request in the body of a first, by an ambiguous length", "stranger",
        "a request with both a transfer coding and a length is refused", UnreadableRequest)  # fmt: skip
async def test_smuggle(port: Port, verdict: Verdict) -> None:
    hidden = b"0\r\n\r\nGET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
    said = b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(hidden)
    await refused(port, verdict, said + hidden, 400)


@attack("hide a second request in the body of a first, by a coding that another server decodes", "stranger",
        "chunked is the only transfer coding", UnreadableRequest)  # fmt: skip
async def test_coding(port: Port, verdict: Verdict) -> None:
    said = b"GET /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"
    await refused(port, verdict, said, 501)


@attack("reach a path that a proxy filters out", "stranger", "a path that is not in normal form is refused", UnreadableRequest)
@pytest.mark.parametrize("path", ["/v1/se%61led", "/healthz/../v1/sealed", "//v1/sealed", "/v1/./sealed"])
async def test_path(port: Port, verdict: Verdict, path: str) -> None:
    await refused(port, verdict, POST.replace(b"/v1/sealed", path.encode()) + b"Content-Length: 0\r\n\r\n", 400)


@attack("send thousands of requests ahead on one connection", "stranger",
        "one request is read at a time; the others wait in the network", gain="answers, one after the other")  # fmt: skip
async def test_ahead(honest: Stage) -> None:
    running = most = 0

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        await honest.app(scope, receive, send)
        running -= 1

    async with opened(honest, counted) as port:
        reader, writer = await port.dial(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        answers = b""
        async with asyncio.timeout(60):
            while answers.count(b"HTTP/1.1 200") < 1000 and (more := await reader.read(65536)):
                answers += more
        writer.close()
    assert (answers.count(b"HTTP/1.1 200"), most) == (1000, 1)
