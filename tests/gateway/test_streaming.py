"""Over a real uvicorn on loopback: pieces as they come, aborts that nobody takes for an end, and clients that leave.

Bytes of any kind in any field that somebody reads get a refusal of the table, and never a fault of the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi import FastAPI

from lacre import problems
from lacre.errors import TruncatedStream
from lacre.problems import Problem
from lacre_fabric.work.contract import FabricLost, FabricUnavailable, FrameGap, FrameMissing, ReaderStalled, WorkerLost
from lacre_gateway.audit.log import AuditUnavailable
from lacre_gateway.http.exchange import Stalled
from lacre_gateway.http.server import bind, make_server
from lacre_gateway.settings import Listen
from parts.by_hand import opened
from parts.fake_worker import PIECES, FakeWorker, Script
from parts.stage import Stage
from parts.waiting import until

WHOLE = b"".join(PIECES)
FOREIGN = problems.INVALID_TOKEN.body({"reason": "for-another-audience", "claim": "aud", "request_id": "0" * 32})


@contextlib.asynccontextmanager
async def served(stage: Stage, drain: int = 5, app: FastAPI | None = None) -> AsyncIterator[str]:
    """The gateway, or another of its apps, on a port of its own. Leaving it is what SIGTERM does."""
    listen = Listen(port=0, drain=drain, trusted_proxies=("127.0.0.1",))
    with bind(listen) as listener:
        server = make_server(app or stage.app, listen)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
            await server.settle()


@pytest.fixture
async def url(stage: Stage) -> AsyncIterator[str]:
    async with served(stage) as url:
        yield url


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=url, timeout=10) as http:
        yield http


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
    try:
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


def raw_request(headers: Mapping[str, str], body: bytes, length: int | None = None) -> bytes:
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    size = len(body) if length is None else length
    return f"POST /v1/sealed HTTP/1.1\r\nhost: x\r\n{lines}content-length: {size}\r\n\r\n".encode() + body


async def test_pieces_arrive_as_they_are_sent(stage: Stage, worker: FakeWorker, http: httpx2.AsyncClient) -> None:
    turns = asyncio.Semaphore(0)

    async def turn() -> None:
        await turns.acquire()

    worker.script = Script(between=turn)
    body, _, opener = stage.seal()
    plain: list[bytes] = []
    async with http.stream("POST", "/v1/sealed", content=body, headers=stage.headers()) as response:
        assert (response.status_code, response.headers["transfer-encoding"]) == (200, "chunked")
        assert "content-length" not in response.headers and "server" not in response.headers
        async for piece in response.aiter_raw():
            plain += opener.feed(piece)
            turns.release()  # the worker goes on only when this piece was opened here
    assert [piece for piece in [*plain, *opener.close()] if piece] == list(PIECES)


async def test_large_answer_flows_with_its_reader_s_credit(stage: Stage, worker: FakeWorker, http: httpx2.AsyncClient) -> None:
    """Four times the whole credit: it only arrives if the gateway renews what the client read."""
    worker.script = Script(pieces=tuple(os.urandom(16_000) for _ in range(70)))
    body, _, opener = stage.seal()
    response = await stage.post(http, body=body)
    assert opened(opener, response.content) == b"".join(worker.script.pieces)


async def test_connection_is_used_again(stage: Stage, worker: FakeWorker, url: str) -> None:
    """Also after a refusal, as long as the body was there already."""
    async with connected(url) as (reader, writer):
        for audience, status in (("x", 401), (None, 200), ("y", 401), (None, 200)):
            token = stage.issuer.token(aud=audience) if audience else None
            writer.write(raw_request(stage.headers(token), stage.seal()[0]))
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(f"http/1.1 {status}".encode()) and b"connection: close" not in head
            await (reader.readuntil(b"\r\n0\r\n\r\n") if status == 200 else reader.readexactly(len(FOREIGN)))


def failing(stage: Stage, error: Exception) -> Script:
    """The frames end with an error, after one piece was read."""

    async def fail() -> None:
        await until(lambda: any(each.started for each in stage.gateway.metrics.live))
        for inbound in stage.hub.inbound.values():
            inbound.fail(error)  # type: ignore[arg-type]  # one is a fault of the gateway's own
        await asyncio.Event().wait()

    return Script(between=fail)


LOST = ["error:urn:lacre:problem:worker-lost", "error:x", "silence", WorkerLost("x"), FrameGap("x"), ValueError("a fault")]
ALIVE = [FabricUnavailable("x"), FabricLost("x"), FrameMissing("x"), ReaderStalled("x"), AuditUnavailable("x"), Stalled()]


@pytest.mark.parametrize("ending", [*LOST, *ALIVE], ids=repr)
async def test_how_a_broken_answer_ends(
    ending: str | Exception, stage: Stage, worker: FakeWorker, http: httpx2.AsyncClient
) -> None:
    """In order where its worker may be lost, so that a client counts it; with a broken connection otherwise. Never whole."""
    worker.script = Script(ending=ending) if isinstance(ending, str) else failing(stage, ending)
    body, _, opener = stage.seal()
    got: list[bytes] = []
    lives = pytest.raises(httpx2.RemoteProtocolError, match="incomplete chunked read")
    with lives if ending in ALIVE else contextlib.nullcontext():
        async with http.stream("POST", "/v1/sealed", content=body, headers=stage.headers()) as response:
            assert response.status_code == 200
            async for piece in response.aiter_raw():
                got.append(piece)
    assert got
    with pytest.raises(TruncatedStream):
        opened(opener, b"".join(got))
    outcome = (await stage.trail())[1]
    assert (outcome["outcome"], outcome["status"], outcome["unreceipted"]) == ("broken", 200, True)
    assert stage.gateway.limits.running == 0
    [line] = [entry for entry in stage.logged() if entry["event"] == "request"]
    assert line["outcome"] == "cut"


async def test_abort_in_raw_bytes_and_in_the_log(
    stage: Stage, worker: FakeWorker, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker.script = failing(stage, FabricLost("x"))
    async with connected(url) as (reader, writer):
        writer.write(raw_request(stage.headers(), stage.seal()[0]))
        everything = await reader.read()  # to the end of the connection
    assert everything.startswith(b"HTTP/1.1 200") and not everything.endswith(b"0\r\n\r\n")
    await stage.trail()
    assert [record for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("when", ["before the answer", "in mid-answer"])
async def test_client_that_leaves(when: str, stage: Stage, worker: FakeWorker, http: httpx2.AsyncClient) -> None:
    """The worker is told at once, its slot is free, and the outcome says so."""
    forever = asyncio.Event()
    worker.script = Script(before=forever.wait) if when == "before the answer" else Script(between=forever.wait)
    with contextlib.suppress(httpx2.ReadTimeout):
        request = http.stream("POST", "/v1/sealed", content=stage.seal()[0], headers=stage.headers(), timeout=0.3)
        async with request as response:
            await anext(aiter(response.aiter_raw()))
    await until(lambda: worker.cancelled)
    outcome = (await stage.trail())[1]
    assert (outcome["outcome"], outcome["status"]) == ("client-gone", None if when == "before the answer" else 200)
    await until(lambda: stage.gateway.limits.running == 0)
    assert stage.hub.inbound == {}


async def test_who_leaves_pays_for_what_was_made(stage: Stage, worker: FakeWorker, url: str) -> None:
    """Also where it leaves between two beats: the worker says once more what it used."""
    beaten = asyncio.Event()

    async def forever() -> None:
        beaten.set()
        await asyncio.Event().wait()

    worker.script = Script(between=forever, parting={"prompt_tokens": 12, "completion_tokens": 9})
    async with connected(url) as (reader, writer):
        writer.write(raw_request(stage.headers(), stage.seal()[0]))
        await beaten.wait()
        await reader.readuntil(b"\r\n\r\n")
    outcome = (await stage.trail())[1]
    assert (outcome["outcome"], outcome["unreceipted"]) == ("client-gone", False)
    assert (outcome["prompt_tokens"], outcome["completion_tokens"]) == (12, 9)


async def test_client_that_stops_reading(stage: Stage, worker: FakeWorker, url: str) -> None:
    """The worker's credit runs out and no more than that is ever held for the client."""
    worker.script = Script(pieces=tuple(os.urandom(16_000) for _ in range(400)), between=lambda: asyncio.sleep(0))
    with socket.socket() as stream:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stream.connect(("127.0.0.1", urlsplit(url).port))
        stream.sendall(raw_request(stage.headers(), stage.seal()[0]))
        await until(lambda: worker.cancelled == 0 and stage.gateway.limits.running == 1)
        await asyncio.sleep(0.5)
        assert stage.gateway.limits.running == 1
    await until(lambda: stage.gateway.limits.running == 0)


async def test_refusal_reaches_a_client_that_is_still_sending(stage: Stage, url: str) -> None:
    """Closing at once would reset the connection and lose the refusal."""
    body = bytes(3 * 2**20)
    async with connected(url) as (reader, writer):
        writer.write(raw_request(stage.headers(stage.issuer.token(aud="x")), body[: 2**20], length=len(body)))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert head.startswith(b"http/1.1 401") and b"connection: close" in head
        assert Problem.type_in(await reader.readexactly(len(FOREIGN))) == problems.INVALID_TOKEN.type
        writer.write(body[2**20 :])
        await writer.drain()
        assert await reader.read() == b""


async def test_chunked_upload_without_length(stage: Stage, worker: FakeWorker, http: httpx2.AsyncClient) -> None:
    body, _, opener = stage.seal()

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    response = await http.post("/v1/sealed", content=pieces(), headers=stage.headers())
    assert opened(opener, response.content) == WHOLE


async def test_shutdown_aborts_what_takes_too_long(stage: Stage, worker: FakeWorker) -> None:
    worker.script = Script(ending="silence", between=asyncio.Event().wait)
    async with httpx2.AsyncClient() as http:
        async with served(stage, drain=1) as url:
            answering = asyncio.create_task(http.post(f"{url}/v1/sealed", content=stage.seal()[0], headers=stage.headers()))
            await until(lambda: worker.opened)
        with pytest.raises(httpx2.RemoteProtocolError):
            await answering
    assert (await stage.trail())[1]["outcome"] == "interrupted"
    assert worker.cancelled == 1


# Odd bytes


VALUES = (
    b"", b"\xff\xfe", b"\xc3\xa9", b"\t", b"[", b"%00", b"a" * 30_000, b"=?utf-8?q?x?=", b'; ; =;"', b"9" * 400, b"-1", b"{}",
)  # fmt: skip
FIELDS = (
    b"accept", b"authorization", b"connection", b"content-encoding", b"content-type", b"cookie", b"dpop", b"expect", b"host",
    b"forwarded", b"if-none-match", b"lacre-action", b"lacre-max-tokens", b"lacre-model", b"lacre-pool", b"lacre-shape",
    b"lacre-max-tokens-default", b"lacre-affinity", b"origin", b"range", b"te", b"traceparent", b"upgrade", b"x-forwarded-for",
    b"x-forwarded-proto",
)  # fmt: skip
CALLS = {
    "public": (
        b"POST /v1/sealed", b"GET /v1/manifest", b"GET /readyz", b"HEAD /healthz", b"OPTIONS /v1/sealed", b"DELETE /nowhere",
    ),
    "admin": (
        b"POST /v1/revocations", b"GET /v1/usage?tenant=%C3%A9&tenant=x", b"GET /v1/status", b"GET /metrics", b"PUT /v1/drain",
    ),
}  # fmt: skip


def request_of(call: bytes, name: bytes, *values: bytes, token: bytes) -> bytes:
    usual = {
        b"host": b"x", b"authorization": b"Bearer " + token, b"content-type": b"application/json", b"connection": b"close",
    }  # fmt: skip
    lines = [key + b": " + value for key, value in usual.items() if key != name]
    lines += [name + b": " + value for value in values]
    return b"\r\n".join([call + b" HTTP/1.1", *lines, b"content-length: 2", b"", b"{}"])


async def status(url: str, said: bytes) -> int:
    async with connected(url) as (reader, writer), asyncio.timeout(20):
        writer.write(said)
        line = await reader.readline()
        writer.transport.abort()
    found = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [ -~]+\r\n", line)
    assert found, line
    return int(found[1])


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("which", CALLS)
async def test_any_value(which: str, stage: Stage, name: bytes, caplog: pytest.LogCaptureFixture) -> None:
    stage.gateway.refusals._clock = lambda: 0.0
    stage.gateway.refusals._limits = {"subject": 10**6, "address": 10**6}
    token = stage.issuer.token(scope="lacre:admin", sub="root").encode()
    async with served(stage, drain=1, app=stage.app if which == "public" else stage.admin) as url:
        for call in CALLS[which]:
            for values in [*((value,) for value in VALUES), (b"a", b"b")]:
                got = await status(url, request_of(call, name, *values, token=token))
                assert got < 500 or got == 503, (call, name, values, got, caplog.text)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
