"""Slow clients, too many clients, and TLS: over a real uvicorn on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import socket
import ssl
import warnings
from functools import partial
from pathlib import Path

import httpx2
import pytest

from lacre.errors import SettingsError
from lacre_gateway.http.certificate import tls_context
from lacre_gateway.http.server import Server, bind, make_server
from lacre_gateway.settings import Listen, Tls
from parts.by_hand import opened
from parts.certificates import Ca
from parts.fake_worker import FakeWorker
from parts.stage import Stage, until

from .conftest import served

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
LATE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


async def dial(port: int, said: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    await writer.drain()
    return reader, writer


async def heard(reader: asyncio.StreamReader) -> bytes:
    """All that comes until the connection is closed."""
    async with asyncio.timeout(20):
        with contextlib.suppress(ConnectionResetError):
            return await reader.read()
    return b""


async def trickle(writer: asyncio.StreamWriter, what: bytes) -> None:
    """Never silent for long, never finished: no idle limit would notice."""
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(what)
            await writer.drain()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("said", "then", "answers", "late"),
    [
        pytest.param(b"", b"", 0, True, id="nothing"),
        pytest.param(b"GET /healthz HT", b"", 0, True, id="half a request line"),
        pytest.param(b"GET /healthz HTTP/1.1\r\n", b"x-slow: y\r\n", 0, True, id="headers without end"),
        pytest.param(HEALTH, b"\r\n", 1, True, id="empty lines after a request"),
        pytest.param(HEALTH + b"POST /v1/", b"s", 1, True, id="a second request that never comes"),
        pytest.param(HEALTH[:-2] + b"content-length: 1000000\r\n\r\n", b".", 1, False, id="a body that nobody waits for"),
    ],
)
async def test_what_does_not_come(stage: Stage, said: bytes, then: bytes, answers: int, late: bool) -> None:
    """It does not hold the connection for ever. What needs no body is answered at once."""
    async with served(stage.app, header_timeout=0.4) as (_, port):
        reader, writer = await dial(port, said)
        slow = asyncio.create_task(trickle(writer, then))
        told = await heard(reader)
        slow.cancel()
        writer.close()
    assert told.count(b"HTTP/1.1 200 OK") == answers
    assert told.endswith(LATE) is (b"408" in told) is late


async def test_patience_is_not_for_answers(stage: Stage, worker: FakeWorker) -> None:
    """An answer may take as long as it takes, and so may the pause between two requests."""

    async def pause() -> None:
        await asyncio.sleep(0.3)

    worker.script.between = pause
    async with (
        served(stage.app, header_timeout=0.2) as (_, port),
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        for _ in range(2):
            body, _, opener = stage.seal()
            answer = await stage.post(http, body=body)
            assert opened(opener, answer.content)
            await asyncio.sleep(0.3)


async def test_too_many_connections(stage: Stage) -> None:
    """Whoever waits longest without a request makes room; whoever has one under way does not."""
    async with served(stage.app, connections=3) as (server, port):
        busy = await dial(port, b"POST /v1/sealed HTTP/1.1\r\nhost: x\r\n")
        for name, value in stage.headers().items():
            busy[1].write(f"{name}: {value}\r\n".encode())
        busy[1].write(b"content-length: 100000\r\n\r\n")
        await until(lambda: len(stage.gateway.metrics.live) == 1)
        idle = [await dial(port, b"GET /heal") for _ in range(2)]
        newest = await dial(port, HEALTH)
        async with asyncio.timeout(20):
            assert (await newest[0].readline()).startswith(b"HTTP/1.1 200")
        assert await heard(idle[0][0]) == b""  # cut off
        await until(lambda: len(server.server_state.connections) <= 3)
        assert len(stage.gateway.metrics.live) == 1
        for _, writer in (busy, *idle, newest):
            writer.close()


async def answered(port: int, stage: Stage, body: bytes, trailer: str, **changes: str | None) -> str:
    """The status of a sealed request whose body is chunked and ends with a trailer."""
    lines = [f"{name}: {value}" for name, value in stage.headers(**changes).items()]
    head = "\r\n".join(["POST /v1/sealed HTTP/1.1", "host: x", "connection: close", "transfer-encoding: chunked", *lines])
    reader, writer = await dial(
        port, head.encode() + b"\r\n\r\n%x\r\n%b\r\n0\r\n%b\r\n\r\n" % (len(body), body, trailer.encode())
    )
    told = await heard(reader)
    writer.close()
    return told[9:12].decode()


async def test_trailers_are_no_headers(stage: Stage, worker: FakeWorker) -> None:
    async with served(stage.app, trusted_proxies=("127.0.0.1",)) as (_, port):
        token = stage.headers()["authorization"]
        said = ({"lacre_pool": None}, "Lacre-Pool: default"), ({"authorization": None}, f"Authorization: {token}")
        assert [await answered(port, stage, stage.seal()[0], trailer, **without) for without, trailer in said] == ["400", "401"]
        forged = "X-Forwarded-For: 203.0.113.66"
        assert await answered(port, stage, stage.seal()[0], forged, x_forwarded_for="192.0.2.1") == "200"
    assert [entry["address"] for entry in await stage.trail() if entry["kind"] == "intent"] == ["192.0.2.1"]


@pytest.mark.parametrize("forwarded", ["[", "x" * 5000, "10.0.0.1, caf\u00e9", "fe80::1%eth0", ""])
async def test_an_address_that_is_none(stage: Stage, worker: FakeWorker, forwarded: str) -> None:
    """What a trusted proxy passes on is its caller's word where it does not check it."""
    async with served(stage.app, trusted_proxies=("127.0.0.1",)) as (_, port):
        assert await answered(port, stage, stage.seal()[0], "A: b", x_forwarded_for=forwarded) in ("200", "403")


@pytest.fixture
def ca(tmp_path: Path) -> Ca:
    return Ca(tmp_path)


@pytest.fixture
def tls(ca: Ca, tmp_path: Path) -> Tls:
    """A certificate for 127.0.0.1 whose name is `first`."""
    pair = ca.issue(tmp_path, "first")
    return Tls(certificate=pair.certificate, key=pair.key)


async def named(port: int, ca: Ca, at_most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> str:
    """Whom a client that trusts this authority alone meets."""
    client = ssl.create_default_context(cafile=str(ca.file))
    client.minimum_version, client.maximum_version = ssl.TLSVersion.TLSv1_2, at_most
    async with asyncio.timeout(20):
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
    tls = writer.get_extra_info("ssl_object")
    [[(_, name)]] = tls.getpeercert()["subject"]
    writer.close()
    return f"{name} {tls.version()}"


async def test_tls(stage: Stage, worker: FakeWorker, tls: Tls, ca: Ca) -> None:
    async with served(stage.app, partial(tls_context, tls)) as (_, port):
        verify = ssl.create_default_context(cafile=str(ca.file))
        async with httpx2.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=verify) as http:
            body, _, opener = stage.seal()
            answer = await stage.post(http, body=body)
            assert opened(opener, answer.content)
        reader, writer = await dial(port, HEALTH)
        assert not (await heard(reader)).startswith(b"HTTP")  # plain HTTP is not answered
        writer.close()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert (await named(port, ca, version)).startswith("first TLSv1.")


async def test_a_handshake_that_does_not_come(stage: Stage, tls: Tls) -> None:
    """Whoever speaks no TLS has as long as a head: not the minute that is usual."""
    async with served(stage.app, partial(tls_context, tls), header_timeout=0.3) as (_, port):
        reader, writer = await dial(port, b"\x16\x03")
        assert await heard(reader) == b""
        writer.close()


@pytest.mark.parametrize("limit", ["connections", "connections_per_address"])
async def test_too_many_handshakes(stage: Stage, tls: Tls, ca: Ca, limit: str) -> None:
    """A handshake takes a place like any connection: the one that takes longest makes room, and its successor is served."""
    async with served(stage.app, partial(tls_context, tls), **{limit: 3}) as (server, port):
        waiting = [await dial(port, b"\x16\x03") for _ in range(5)]
        for reader, _ in waiting[:2]:
            assert await heard(reader) == b""
        assert await named(port, ca) == "first TLSv1.3"
        assert server.config.door.cut == 3
        for _, writer in waiting:
            writer.close()
        await until(lambda: not server.config.door.inside)


async def test_a_handshake_makes_room_for_its_connection(stage: Stage, tls: Tls, ca: Ca) -> None:
    """It is not counted twice: with one place, each of many requests is served."""
    verify = ssl.create_default_context(cafile=str(ca.file))
    async with served(stage.app, partial(tls_context, tls), connections=1, connections_per_address=1) as (server, port):
        for _ in range(5):
            async with httpx2.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=verify) as http:
                assert (await http.get("/healthz")).status_code == 200
            await until(lambda: not server.config.door.inside)
        assert server.config.door.cut == 0


async def test_nobody_can_be_accepted(stage: Stage, tls: Tls, ca: Ca) -> None:
    """Without a file to spare, the listener tries again: it is not lost."""
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
    async with served(stage.app, partial(tls_context, tls)) as (_, port):
        dialled = socket.socket()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (dialled.fileno() + 1, hard))
        try:
            await asyncio.to_thread(dialled.connect, ("127.0.0.1", port))
            await asyncio.sleep(0.1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        dialled.close()
        assert await named(port, ca) == "first TLSv1.3"
    assert not failures


def test_tls_that_is_old_and_files_that_do_not_do(tls: Tls) -> None:
    assert tls_context(tls).minimum_version is ssl.TLSVersion.TLSv1_2
    tls.key.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        tls_context(tls)
    tls.key.chmod(0o600)
    tls.certificate.unlink()
    with pytest.raises(SettingsError, match="certificate's chain"):
        tls_context(tls)


async def test_time_is_what_ends_it(stage: Stage) -> None:
    """A deadline, not a race: a head that comes in time, in pieces, is served."""
    async with served(stage.app, header_timeout=30) as (_, port):
        reader, writer = await dial(port)
        for at in range(len(HEALTH)):
            writer.write(HEALTH[at : at + 1])
            await writer.drain()
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


@pytest.mark.parametrize("turns", range(7))
async def test_a_connection_that_comes_in_the_turn_of_the_end(stage: Stage, turns: int) -> None:
    """Nobody waits for it until the drain is over, and its socket is closed."""

    class Ending(Server):
        client: socket.socket

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            assert sockets
            self.client = socket.create_connection(sockets[0].getsockname())
            for _ in range(turns):
                await asyncio.sleep(0)
            await super().shutdown(sockets)

    gc.collect()
    with warnings.catch_warnings(record=True) as warned, bind(Listen(port=0, drain=1)) as listener:
        warnings.simplefilter("always")
        made = make_server(stage.app, Listen(port=0, drain=1))
        server = Ending(made.config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started)
        server.should_exit = True
        await serving
        assert not server.server_state.connections
        server.client.close()
        await asyncio.sleep(0)
        gc.collect()
    assert [str(each.message) for each in warned if each.category is ResourceWarning] == []
