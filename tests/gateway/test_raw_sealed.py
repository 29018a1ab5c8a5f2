"""Sealed requests in raw bytes over real sockets: what clients, proxies and old protocols do to one connection."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lacre import problems
from lacre.problems import Problem
from lacre.wire.header import MAX_SEALED_REQUEST
from lacre_fabric.work.contract import FabricLost
from parts.by_hand import opened
from parts.certificates import Ca
from parts.fake_worker import PIECES, FakeWorker, Script
from parts.stage import Stage
from parts.waiting import until

from .conftest import served

WHOLE = b"".join(PIECES)
LAST = b"\r\n0\r\n\r\n"
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: a close is a reset


class Wire:
    """One connection of a client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def say(self, *said: bytes) -> None:
        self.writer.write(b"".join(said))

    async def head(self) -> bytes:
        async with asyncio.timeout(20):
            return (await self._reader.readuntil(b"\r\n\r\n")).lower()

    async def chunks(self) -> bytes:
        """A chunked body, to its last chunk."""
        body = b""
        async with asyncio.timeout(20):
            while size := int(await self._reader.readline(), 16):
                body += (await self._reader.readexactly(size + 2))[:-2]
            assert await self._reader.readline() == b"\r\n"
        return body

    async def exactly(self, size: int) -> bytes:
        async with asyncio.timeout(20):
            return await self._reader.readexactly(size)

    async def rest(self) -> bytes:
        async with asyncio.timeout(20):
            return await self._reader.read()


@contextlib.asynccontextmanager
async def dial(port: int, context: ssl.SSLContext | None = None) -> AsyncIterator[Wire]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            await writer.wait_closed()


@pytest.fixture
async def port(stage: Stage) -> AsyncIterator[int]:
    async with served(stage.app) as (_, port):
        yield port


@pytest.fixture
async def wire(port: int) -> AsyncIterator[Wire]:
    async with dial(port) as wire:
        yield wire


def request(stage: Stage, body: bytes, *fields: str, version: str = "1.1", length: int | None = None, **changes: Any) -> bytes:
    headers = [f"{name}: {value}" for name, value in stage.headers(**changes).items()]
    framed = (
        [] if any(field.startswith("transfer-encoding") for field in fields) else [f"content-length: {length or len(body)}"]
    )
    lines = [f"POST /v1/sealed HTTP/{version}", "host: x", *headers, *framed, *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def chunked(body: bytes, size: int) -> bytes:
    pieces = (body[start : start + size] for start in range(0, len(body), size))
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def test_ahead_of_each_other(stage: Stage, worker: FakeWorker, wire: Wire) -> None:
    """The answers come in the order of the requests, each to its own."""
    sealed = [stage.seal() for _ in range(5)]
    wire.say(*(request(stage, body) for body, _, _ in sealed))
    for _, _, opener in sealed:
        assert b"connection: close" not in await wire.head()
        assert opened(opener, await wire.chunks()) == WHOLE


@pytest.mark.parametrize("size", [1, 3, 256, 10**6])
async def test_chunks_of_any_size(size: int, stage: Stage, worker: FakeWorker, wire: Wire) -> None:
    body, _, opener = stage.seal()
    wire.say(request(stage, chunked(body, size), "transfer-encoding: chunked"))
    await wire.head()
    assert opened(opener, await wire.chunks()) == WHOLE


async def test_told_to_go_on(stage: Stage, worker: FakeWorker, wire: Wire) -> None:
    body, _, opener = stage.seal()
    wire.say(request(stage, b"", "expect: 100-continue", length=len(body)))
    assert await wire.head() == b"http/1.1 100 continue\r\n\r\n"
    wire.say(body)
    assert (await wire.head()).startswith(b"http/1.1 200")
    assert opened(opener, await wire.chunks()) == WHOLE


async def test_an_old_client_and_its_whole_answer(stage: Stage, worker: FakeWorker, wire: Wire) -> None:
    """HTTP/1.0 knows no chunks: its answer ends with the connection (RFC 9112 section 6.3)."""
    body, _, opener = stage.seal()
    wire.say(request(stage, body, "connection: keep-alive", version="1.0"))
    head = await wire.head()
    assert head.startswith(b"http/1.1 200") and b"transfer-encoding" not in head and b"connection: close" in head
    assert opened(opener, await wire.rest()) == WHOLE


async def test_an_old_client_and_an_answer_that_breaks_off(stage: Stage, worker: FakeWorker, wire: Wire) -> None:
    """A close in order would be an end."""
    worker.script = Script(between=asyncio.Event().wait)
    body, _, _ = stage.seal()
    wire.say(request(stage, body, version="1.0"))
    await wire.head()
    for inbound in stage.hub.inbound.values():
        inbound.fail(FabricLost("x"))
    with pytest.raises(ConnectionResetError):
        await wire.rest()


@pytest.mark.parametrize("announced", [True, False])
async def test_too_much_and_the_refusal_is_read(announced: bool, stage: Stage, worker: FakeWorker, wire: Wire) -> None:
    body = stage.seal()[0] + bytes(MAX_SEALED_REQUEST + 2**20)
    if announced:
        wire.say(request(stage, body[: 2**16], length=len(body)))
    else:
        wire.say(request(stage, chunked(body, 2**16), "transfer-encoding: chunked"))
    head = await wire.head()
    assert head.startswith(b"http/1.1 413") and b"connection: close" in head
    size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert Problem.type_in(await wire.exactly(size)) == problems.TOO_LARGE.type
    assert worker.opened == []


async def test_half_closed(stage: Stage, worker: FakeWorker, port: int) -> None:
    """Who sends no more and would still read counts as gone, as with the other routes: nothing is worked on for it."""
    worker.script = Script(between=asyncio.Event().wait)
    async with dial(port) as wire:
        wire.say(request(stage, stage.seal()[0]))
        await wire.head()
        wire.writer.write_eof()
        await until(lambda: worker.cancelled == 1)
        assert not (await wire.rest()).endswith(LAST)
    assert (await stage.trail())[1]["outcome"] == "client-gone"


async def test_reset(stage: Stage, worker: FakeWorker, port: int) -> None:
    worker.script = Script(between=asyncio.Event().wait)
    async with dial(port) as wire:
        wire.say(request(stage, stage.seal()[0]))
        await wire.head()
        wire.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        wire.writer.transport.abort()
        await until(lambda: worker.cancelled == 1)
    assert (await stage.trail())[1]["outcome"] == "client-gone"
    await until(lambda: not stage.gateway.metrics.live)


async def test_a_slow_reader_gets_all_of_it(stage: Stage, worker: FakeWorker, port: int) -> None:
    pieces = tuple(bytes([number]) * 16_000 for number in range(60))
    worker.script = Script(pieces=pieces)
    body, _, opener = stage.seal()
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        slow.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=slow.dup(), limit=2**14)
        writer.write(request(stage, body))
        await reader.readuntil(b"\r\n\r\n")
        got = b""
        while not got.endswith(LAST):
            got += await asyncio.wait_for(reader.read(4096), 20)
            await asyncio.sleep(0)
        writer.close()
    plain = b""
    while size := int(got[: got.index(b"\r\n")], 16):
        got = got[got.index(b"\r\n") + 2 :]
        plain, got = plain + got[:size], got[size + 2 :]
    assert opened(opener, plain) == b"".join(pieces)


async def test_over_tls(stage: Stage, worker: FakeWorker, tmp_path: Path) -> None:
    authority = Ca(tmp_path / "tls")
    pair = authority.issue(tmp_path / "tls", "server")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pair.certificate, pair.key)
    client = ssl.create_default_context(cafile=authority.file)
    async with served(stage.app, lambda: server) as (_, port), dial(port, client) as wire:
        for _ in range(3):
            body, _, opener = stage.seal()
            wire.say(request(stage, body))
            await wire.head()
            assert opened(opener, await wire.chunks()) == WHOLE
        wire.say(request(stage, stage.seal()[0], token=stage.issuer.token(aud="x")))
        assert (await wire.head()).startswith(b"http/1.1 401")


async def test_drain(stage: Stage, worker: FakeWorker) -> None:
    """A running answer ends whole, then its connection; one that has not begun says so in its head."""
    turns = asyncio.Semaphore(0)

    async def turn() -> None:
        await turns.acquire()

    worker.script = Script(before=turn, between=turn)
    begun, waiting = stage.seal(), stage.seal()
    async with served(stage.app, drain=10) as (server, port), dial(port) as first, dial(port) as second:
        first.say(request(stage, begun[0]))
        await until(lambda: len(worker.opened) == 1)
        turns.release()
        assert b"connection: close" not in await first.head()
        second.say(request(stage, waiting[0]))
        await until(lambda: len(worker.opened) == 2)
        server.should_exit = True
        await until(lambda: not server.servers[0].is_serving())
        await asyncio.sleep(0.3)
        for _ in range(10):
            turns.release()
        assert b"connection: close" in await second.head()
        for wire, (_, _, opener) in ((first, begun), (second, waiting)):
            assert opened(opener, await wire.chunks()) == WHOLE
            assert await wire.rest() == b""


FORWARDED = ("198.51.100.7", "203.0.113.9, 198.51.100.7", "[2001:db8::1]:443", "198.51.100.7:99", "<script>", "", "127.0.0.1")


@pytest.mark.parametrize("trusted", [("127.0.0.1",), ()])
async def test_the_address_is_the_same_on_both_kinds_of_routes(
    trusted: tuple[str, ...], stage: Stage, worker: FakeWorker
) -> None:
    async with served(stage.app, trusted_proxies=trusted) as (_, port):
        for named in FORWARDED:
            fields = f"x-forwarded-for: {named}\r\nconnection: close"
            for said in (
                request(stage, stage.seal()[0], fields),
                f"GET /v1/manifest HTTP/1.1\r\nhost: x\r\n{fields}\r\n\r\n".encode(),
            ):
                async with dial(port) as wire:
                    wire.say(said)
                    await wire.rest()
    lines = [line for line in stage.logged() if line["event"] == "request"]
    sealed = [line["address"] for line in lines if line["route"] == "/v1/sealed"]
    assert sealed == [line["address"] for line in lines if line["route"] == "/v1/manifest"]
    assert len(sealed) == len(FORWARDED) and len(set(sealed)) == (4 if trusted else 1)


async def test_lines_of_its_requests(stage: Stage, worker: FakeWorker, wire: Wire) -> None:
    """One each, with what the answer's head says."""
    wire.say(request(stage, stage.seal()[0]))
    heads = [await wire.head()]
    await wire.chunks()
    wire.say(request(stage, b"", lacre_action="none"))
    heads.append(await wire.head())
    await until(lambda: len(stage.logged()) >= 2)
    first, second = [line for line in stage.logged() if line["event"] == "request"]
    for head, line in zip(heads, (first, second), strict=True):
        assert f"lacre-request-id: {line['request_id']}".encode() in head and b"\r\ndate: " in head
        assert (line["method"], line["route"], line["address"]) == ("POST", "/v1/sealed", "127.0.0.1")
    assert (first["status"], first["outcome"], "problem" in first) == (200, "whole", False)
    assert (second["status"], second["outcome"], second["problem"]) == (400, "whole", "invalid-headers")
