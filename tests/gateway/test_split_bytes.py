"""A connection's answers depend on the bytes that came, never on how the network cut them."""

from __future__ import annotations

import asyncio
import io
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from lacre import problems
from lacre_fabric.logs import make_log
from lacre_gateway.budget.in_flight import BodyBytes, BodyReservation
from lacre_gateway.http.access_log import RequestLog
from lacre_gateway.http.clock import Clock
from lacre_gateway.http.connection import SealedRoute
from lacre_gateway.http.exchange import Exchange
from lacre_gateway.http.line_limit import LineLimit
from lacre_gateway.http.refusal import Refusal
from lacre_gateway.http.server import make_server
from lacre_gateway.settings import Listen
from parts.in_memory_http import Connection

TURNS = 40  # of the loop in which an answer is made; most take five


class Proof:
    """In place of an audit proof."""

    def header(self) -> str:
        return "proof"


class App:
    """Answers with what it was sent: sealed requests on the connection, others through ASGI."""

    def __init__(self) -> None:
        log = make_log(io.StringIO())
        self.sealed = SealedRoute(self._serve, RequestLog(log, LineLimit(log)), Clock())

    async def _serve(self, exchange: Exchange) -> None:
        room = BodyReservation(BodyBytes(total=10**6, each=10**6), "alice")
        start = await exchange.sealed_start(room, 60, 3)
        body = await exchange.sealed_body(room)
        if start == b"bad":
            await exchange.refuse(Refusal(problems.INVALID_REQUEST))
            return
        await exchange.begin(Proof())  # type: ignore[arg-type]
        await exchange.write([start, b"|"])
        await asyncio.sleep(0)
        await exchange.end([body])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more and (message := await receive())["type"] == "http.request":
            body, more = body + message["body"], message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


def post(body: bytes, *fields: bytes, path: bytes = b"/v1/sealed", version: bytes = b"1.1") -> bytes:
    length = () if any(field.startswith(b"transfer") for field in fields) else (b"content-length: %d" % len(body),)
    return b"\r\n".join([b"POST " + path + b" HTTP/" + version, b"host: x", *length, *fields, b"", body])


CHUNKED = b"transfer-encoding: chunked"
REQUESTS = [
    post(b"hello"),
    post(b""),
    post(b"bad one"),
    post(b"hello", path=b"/elsewhere"),
    post(b"waits", b"expect: 100-continue"),
    post(b"5\r\nhello\r\n1;x=y\r\n!\r\n0\r\n\r\n", CHUNKED),
    post(b"0000A\r\n0123456789\r\n0\r\ntrailer: x\r\nauthorization: y\r\n\r\n", CHUNKED),
    b"\r\n\r\n" + post(b"after blank lines"),
    b"GET /v1/sealed HTTP/1.1\r\nhost: x\r\n\r\n",
]
LAST = [
    post(b"old", version=b"1.0"),
    post(b"the last", b"connection: close"),
    post(b"bad", b"connection: keep-alive, close"),
    post(b"0\r\n\r\n", CHUNKED, b"content-length: 9"),  # a length beside a coding: two readings
    post(b"0\r\n\r\n", b"transfer-encoding: gzip, chunked"),
    post(b"5\r\nhelloXX0\r\n\r\n", CHUNKED),
    post(b"0x5\r\nhello\r\n0\r\n\r\n", CHUNKED),
    post(b"-1\r\n\r\n", CHUNKED),
    post(b"1\r\nx\r\n0\r\ncontent-length: 3\r\n\r\n", CHUNKED),
    post(b"x", b"content-length: 2"),
    b"POST /v1/se%61led HTTP/1.1\r\nhost: x\r\n\r\n",
    b"POST /v1/sealed HTTP/1.1\nhost: x\n\n",
    b"post /v1/sealed HTTP/1.1\r\nhost: x\r\n\r\n",
    post(b"x", b"a: b\x00c"),
]
STREAMS = [[], REQUESTS[:1], REQUESTS[:1] * 3, REQUESTS, REQUESTS[::-1]]
VARYING = re.compile(rb'(?<=lacre-request-id: )[0-9a-f]{32}|(?<="request_id":")[0-9a-f]{32}')


async def answers(stream: bytes, cuts: list[int]) -> bytes:
    """All that comes back, and how the connection ends, where the bytes come in pieces that end at `cuts`."""
    connection = Connection(make_server(App(), Listen(port=0)).connection(), "192.0.2.1")
    edges = [0, *sorted(cuts), len(stream)]
    for start, end in pairwise(edges):
        while not connection.transport.reading.is_set():
            await asyncio.sleep(0)
        if end > start and not await connection.say(stream[start:end]):
            break
        for _ in range(start % 4):
            await asyncio.sleep(0)
    for _ in range(TURNS * (1 + stream.count(b"HTTP/1"))):
        await asyncio.sleep(0)
    got = b""
    while not connection.news.empty():
        got += connection.news.get_nowait()
    ended = b"closed" if connection.transport.ended or connection.transport.half_closed else b"open"
    connection.transport.abort()
    return VARYING.sub(b"?", got) + ended


WHOLE = [b"".join([*stream, last]) for stream in STREAMS[:2] for last in LAST] + [b"".join(each) for each in STREAMS[1:]]


@pytest.mark.parametrize("number", range(len(WHOLE)))
async def test_byte_by_byte(number: int) -> None:
    stream = WHOLE[number]
    whole = await answers(stream, [])
    assert await answers(stream, list(range(1, len(stream)))) == whole


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cut_anywhere(data: st.DataObject) -> None:
    stream = b"".join(data.draw(st.lists(st.sampled_from(REQUESTS), max_size=4)))
    stream += data.draw(st.sampled_from([b"", *LAST]))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=6))

    async def both() -> tuple[bytes, bytes]:
        return await answers(stream, []), await answers(stream, cuts)

    whole, cut = asyncio.run(both())
    assert cut == whole


async def test_what_is_answered() -> None:
    """The property would also hold of a server that says nothing."""
    got = await answers(b"".join([*REQUESTS, LAST[0]]), [])
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", got)
    assert statuses == [b"200", b"200", b"400", b"200", b"100", b"200", b"200", b"200", b"200", b"200", b"200"]
    assert b"4\r\nhel|\r\n5\r\nhello\r\n0\r\n\r\n" in got and b"7\r\nhello!\r\n" not in got
    assert b"4\r\nhel|\r\n6\r\nhello!\r\n0\r\n\r\n" in got and b"4\r\n012|\r\na\r\n0123456789\r\n0\r\n\r\n" in got
    assert got.endswith(b"old|oldclosed") and b"trailer" not in got
