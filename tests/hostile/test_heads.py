"""A stranger: what anybody may send to a port of an honest gateway, before anybody knows who it is."""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from hostile.attacks import Verdict, attack
from hostile.shapes import Test
from lacre import problems
from lacre.runtime.http1 import MAX_HEAD, UnreadableRequest
from lacre.wire.bhttp import encode_request
from lacre.wire.header import MEDIA_TYPE_REQUEST
from lacre.wire.ohttp import seal_request
from lacre_gateway.http.server import Server, bind, make_server
from lacre_gateway.settings import Listen
from parts.keys import MODEL
from parts.stage import Stage
from parts.waiting import until

from .adversary import inner

OUTER = (
    f"Content-Type: {MEDIA_TYPE_REQUEST}\r\nLacre-Pool: default\r\nLacre-Model: {MODEL}\r\nLacre-Action: chat\r\n"
    "Lacre-Max-Tokens: 512\r\nLacre-Shape: none\r\n"
).encode()
POST = b"POST /v1/sealed HTTP/1.1\r\nHost: x\r\n"
HEAD_TIMEOUT = 3.0  # seconds; what is refused is refused much sooner


@dataclass(frozen=True)
class Port:
    """An honest gateway's port. server: what holds it. open: connections to it, which end with the test."""

    server: Server
    number: int
    open: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def door(self) -> Any:
        return self.server.config.door  # type: ignore[attr-defined]

    async def dial(self, said: bytes = b"") -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.number)
        self.open.append(writer)
        writer.write(said)
        return reader

    async def told(self, said: bytes) -> bytes:
        """All that comes back. Raises UnreadableRequest where it is a bare status, and the end of the connection."""
        reader = await self.dial(said)
        async with asyncio.timeout(20):
            answer = await reader.read()
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
        port = Port(server, listener.getsockname()[1])
        try:
            yield port
        finally:
            for writer in port.open:
                writer.close()
            server.should_exit = True
            await serving
            await server.settle()


@pytest.fixture
async def port(honest: Stage) -> AsyncIterator[Port]:
    async with opened(honest) as port:
        yield port


def problem_of(answer: bytes) -> str | None:
    return problems.Problem.type_in(answer.rpartition(b"\r\n\r\n")[2])


def unreadable(name: str, defence: str, *said: tuple[bytes, int]) -> Test:
    """The attack of a stranger that says one of these: the answer is that status, and nothing is kept."""

    @attack(name, "stranger", defence, UnreadableRequest, cases=said, ids=range(len(said)))
    async def test(port: Port, verdict: Verdict, case: tuple[bytes, int]) -> None:
        with verdict.refused() as caught:
            await port.told(case[0])
        assert caught.value.status == case[1]  # type: ignore[attr-defined]
        assert port.door.held_now == 0

    return test


LONG = 4 * MAX_HEAD
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
HIDDEN = b"0\r\n\r\nGET /readyz HTTP/1.1\r\nHost: x\r\n\r\n"
PATHS = (b"/v1/se%61led", b"/healthz/../v1/sealed", b"//v1/sealed", b"/v1/./sealed")

test_endless = unreadable("send a request's head without an end", "a head has 64 KiB, counted before it is kept",
    (POST + b"a: " + b"x" * LONG, 431), (b"GET /" + b"x" * LONG, 414), (POST + b"a: b\r\n" * (LONG // 6), 431),
    (b"\r\n" * (LONG // 2), 431))  # fmt: skip
test_fields = unreadable(
    "send a head of thousands of fields", "a head has 100 fields", (POST + b"a:b\r\n" * 10_000 + b"\r\n", 431)
)
test_smuggle = unreadable("hide a second request in the body of a first, by an ambiguous length",
    "a request with both a transfer coding and a length is refused",
    (HEALTH + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n" % len(HIDDEN) + HIDDEN, 400))  # fmt: skip
test_coding = unreadable("hide a second request in the body of a first, by a coding that another server decodes",
    "chunked is the only transfer coding", (HEALTH + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501))  # fmt: skip
test_path = unreadable("reach a path that a proxy filters out", "a path that is not in normal form is refused",
    *((POST.replace(b"/v1/sealed", path) + b"Content-Length: 0\r\n\r\n", 400) for path in PATHS))  # fmt: skip


@attack("send many incomplete heads at once", "stranger",
        "bytes that no app asked for are bounded over all connections; the longest holder is cut off",
        gain="that its own older connections end")  # fmt: skip
async def test_held(honest: Stage) -> None:
    async with opened(honest, held_bytes=2**20) as port:
        crowd = [await port.dial(POST + b"a: " + b"x" * 60_000) for _ in range(40)]
        for _ in range(200):
            await asyncio.sleep(0.005)
            assert port.door.held_now <= 2**20
            if sum(reader.at_eof() or reader.exception() is not None for reader in crowd) >= 40 - 2**20 // 60_000:
                break
        else:
            pytest.fail("nobody was cut off")
        assert (await port.told(HEALTH + b"Connection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


@attack("hold all connections from one address", "stranger",
        "an address has a bounded number of connections, and its own oldest idle one makes room",
        gain="that its own older connections end")  # fmt: skip
async def test_one_address(honest: Stage) -> None:
    async with opened(honest, connections_per_address=3) as port:
        for _ in range(6):
            await port.dial(b"GET /")
        await until(lambda: len(port.server.server_state.connections) == 3)


@attack("hold connections whose TLS handshake never ends", "stranger",
        "a handshake counts as a connection, in total and for its address; the oldest makes room",
        gain="that its own older connections end", cases=["connections", "connections_per_address"])  # fmt: skip
async def test_handshakes(honest: Stage, case: str) -> None:
    async with opened(honest, context=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), **{case: 3}) as port:
        crowd = [await port.dial(b"\x16\x03") for _ in range(6)]
        async with asyncio.timeout(HEAD_TIMEOUT * 0.8):  # before time would end them
            for reader in crowd[:3]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
        assert port.door.inside == 3


@attack("authenticate with a token in the trailers, behind the body", "stranger",
        "a request's fields are those of its head; trailers are dropped", problems.INVALID_TOKEN)  # fmt: skip
async def test_trailer(stage: Stage, honest: Stage, port: Port, verdict: Verdict) -> None:
    worker = await stage.worker()
    sealed, *_ = seal_request(stage.keys.pool.config, encode_request(inner()))
    body = b"%x\r\n%b\r\n0\r\nAuthorization: Bearer %b\r\n\r\n" % (len(sealed), sealed, honest.token.encode())
    verdict.said(problem_of(await port.told(POST + OUTER + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + body)))
    assert worker.calls == 0


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
        reader = await port.dial((HEALTH + b"\r\n") * 1000)
        answers = b""
        async with asyncio.timeout(60):
            while answers.count(b"HTTP/1.1 200") < 1000 and (more := await reader.read(65536)):
                answers += more
    assert (answers.count(b"HTTP/1.1 200"), most) == (1000, 1)
