"""Over a real uvicorn on loopback: pieces as they come, aborts that nobody takes for an end, and clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Mapping
from urllib.parse import urlsplit

import httpx2
import pytest
from fastapi import FastAPI

from lacre import problems
from lacre.errors import TruncatedStream
from lacre_fabric.work.contract import FabricLost, FabricUnavailable, FrameGap, FrameMissing, ReaderStalled, WorkerLost
from lacre_gateway.audit.log import AuditUnavailable
from lacre_gateway.http.exchange import Stalled
from lacre_gateway.http.logs import NotOurs
from lacre_gateway.http.server import bind, make_server
from lacre_gateway.settings import Listen
from parts.by_hand import opened
from parts.fake_worker import PIECES, FakeWorker, Script
from parts.stage import Stage
from parts.waiting import until

WHOLE = b"".join(PIECES)
FOREIGN = problems.INVALID_TOKEN.body({"reason": "for-another-audience", "claim": "aud"})


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
    caplog.handler.addFilter(not_ours := NotOurs())
    worker.script = failing(stage, FabricLost("x"))
    async with connected(url) as (reader, writer):
        writer.write(raw_request(stage.headers(), stage.seal()[0]))
        everything = await reader.read()  # to the end of the connection
    assert everything.startswith(b"HTTP/1.1 200") and not everything.endswith(b"0\r\n\r\n")
    await stage.trail()
    assert [record for record in caplog.records if record.name == "uvicorn.error" and record.exc_info] == []
    caplog.handler.removeFilter(not_ours)


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


async def test_client_that_leaves_while_it_uploads(stage: Stage, worker: FakeWorker, url: str) -> None:
    async with connected(url) as (_, writer):
        writer.write(raw_request(stage.headers(), stage.seal()[0][:100], length=5000))
        await until(lambda: stage.gateway.limits.running == 1)
    await until(lambda: stage.gateway.limits.running == 0)
    assert worker.opened == []


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
        assert await reader.readexactly(len(FOREIGN)) == FOREIGN
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


async def test_shutdown_lets_streams_finish(stage: Stage, worker: FakeWorker) -> None:
    go = asyncio.Event()
    worker.script = Script(between=go.wait)
    body, _, opener = stage.seal()
    async with httpx2.AsyncClient() as http:
        async with served(stage) as url:
            answering = asyncio.create_task(http.post(f"{url}/v1/sealed", content=body, headers=stage.headers()))
            await until(lambda: worker.opened)
            asyncio.get_running_loop().call_later(0.3, go.set)
        # Shut down while the answer was under way.
        assert opened(opener, (await answering).content) == WHOLE


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
