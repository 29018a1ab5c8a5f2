"""Slow clients, too many clients, and TLS: over a real uvicorn on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import resource
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lacre.errors import SettingsError
from lacre_gateway.http.server import Server, bind, load_certificate, make_server, tls_context
from lacre_gateway.settings import Listen, Tls
from parts.by_hand import opened
from parts.fake_worker import FakeWorker
from parts.stage import Stage

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@contextlib.asynccontextmanager
async def served(
    stage: Stage, context: ssl.SSLContext | None = None, **listen: float | tuple[str, ...]
) -> AsyncIterator[tuple[Server, int]]:
    settings = Listen(port=0, drain=2, **listen)  # type: ignore[arg-type]
    with bind(settings) as listener:
        server = make_server(stage.app, settings, context)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield server, listener.getsockname()[1]
        finally:
            server.should_exit = True
            await serving
            await server.settle()


async def dial(port: int, said: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(said)
    await writer.drain()
    return reader, writer


async def trickle(writer: asyncio.StreamWriter, what: bytes) -> None:
    """Never silent for long, never finished: no idle limit would notice."""
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(what)
            await writer.drain()
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("said", "then"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(b"GET /healthz HT", b"", id="half a request line"),
        pytest.param(b"GET /healthz HTTP/1.1\r\n", b"x-slow: y\r\n", id="headers without end"),
        pytest.param(HEALTH, b"\r\n", id="empty lines after a request"),
        pytest.param(HEALTH + b"POST /v1/", b"s", id="a second request that never comes"),
    ],
)
async def test_a_head_that_does_not_come(stage: Stage, said: bytes, then: bytes) -> None:
    async with served(stage, header_timeout=0.4) as (_, port):
        reader, writer = await dial(port, said)
        slow = asyncio.create_task(trickle(writer, then or b""))
        async with asyncio.timeout(20):
            told = await reader.read()
        slow.cancel()
        writer.close()
        assert told.count(b"HTTP/1.1 200 OK") == said.count(HEALTH)
        assert told.endswith(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")


async def test_a_body_that_nobody_waits_for(stage: Stage) -> None:
    """The answer is given at once; what still comes does not hold the connection for ever."""
    async with served(stage, header_timeout=0.4) as (_, port):
        reader, writer = await dial(port, b"GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
        slow = asyncio.create_task(trickle(writer, b"."))
        async with asyncio.timeout(20):
            told = await reader.read()
        slow.cancel()
        writer.close()
        assert told.startswith(b"HTTP/1.1 200 OK")
        assert b"408" not in told


async def test_patience_is_not_for_answers(stage: Stage, worker: FakeWorker) -> None:
    """An answer may take as long as it takes, and so may the pause between two requests."""

    async def pause() -> None:
        await asyncio.sleep(0.3)

    worker.script.between = pause
    async with served(stage, header_timeout=0.2) as (_, port), httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        for _ in range(2):
            body, _, opener = stage.seal()
            answer = await stage.post(http, body=body)
            assert opened(opener, answer.content)
            await asyncio.sleep(0.3)


async def test_too_many_connections(stage: Stage) -> None:
    """Whoever waits longest without a request makes room; whoever has one under way does not."""
    async with served(stage, connections=3) as (server, port):
        busy = await dial(port, b"POST /v1/sealed HTTP/1.1\r\nhost: x\r\n")
        for name, value in stage.headers().items():
            busy[1].write(f"{name}: {value}\r\n".encode())
        busy[1].write(b"content-length: 100000\r\n\r\n")
        while len(stage.gateway.metrics.live) != 1:
            await asyncio.sleep(0.01)
        idle = [await dial(port, b"GET /heal") for _ in range(2)]
        newest = await dial(port, HEALTH)
        async with asyncio.timeout(20):
            assert (await newest[0].readline()).startswith(b"HTTP/1.1 200")
            with contextlib.suppress(ConnectionError):
                assert await idle[0][0].read() == b""  # cut off
            while len(server.server_state.connections) > 3:
                await asyncio.sleep(0.01)
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
    async with asyncio.timeout(20):
        told = await reader.read()
    writer.close()
    return told[9:12].decode()


async def test_trailers_are_no_headers(stage: Stage, worker: FakeWorker) -> None:
    async with served(stage, trusted_proxies=("127.0.0.1",)) as (_, port):
        token = stage.headers()["authorization"]
        said = ({"lacre_pool": None}, "Lacre-Pool: default"), ({"authorization": None}, f"Authorization: {token}")
        assert [await answered(port, stage, stage.seal()[0], trailer, **without) for without, trailer in said] == ["400", "401"]
        forged = "X-Forwarded-For: 203.0.113.66"
        assert await answered(port, stage, stage.seal()[0], forged, x_forwarded_for="192.0.2.1") == "200"
    assert [entry["address"] for entry in await stage.trail() if entry["kind"] == "intent"] == ["192.0.2.1"]


@pytest.mark.parametrize("forwarded", ["[", "x" * 5000, "10.0.0.1, caf\u00e9", "fe80::1%eth0", ""])
async def test_an_address_that_is_none(stage: Stage, worker: FakeWorker, forwarded: str) -> None:
    """What a trusted proxy passes on is its caller's word where it does not check it."""
    async with served(stage, trusted_proxies=("127.0.0.1",)) as (_, port):
        assert await answered(port, stage, stage.seal()[0], "A: b", x_forwarded_for=forwarded) in ("200", "403")


def certificate(folder: Path, name: str, days: float = 30) -> Tls:
    """A certificate of its own for 127.0.0.1, with `name` as its common name."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject).issuer_name(subject).public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=40)).not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )  # fmt: skip
    (folder / "key.pem").write_bytes(private)
    (folder / "key.pem").chmod(0o600)
    return Tls(certificate=folder / "cert.pem", key=folder / "key.pem")


def peer_name(port: int, *, trust: Path, at_most: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> str:
    """Whom a client that trusts `trust` alone meets."""
    client = ssl.create_default_context(cafile=str(trust))
    client.minimum_version, client.maximum_version = ssl.TLSVersion.TLSv1_2, at_most
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        client.wrap_socket(plain, server_hostname="127.0.0.1") as tls,
    ):
        found = tls.getpeercert()
        assert found is not None
        [[(_, name)]] = found["subject"]  # type: ignore[misc]
        return f"{name} {tls.version()}"


async def test_tls(stage: Stage, worker: FakeWorker, tmp_path: Path) -> None:
    tls = certificate(tmp_path, "first")
    context = tls_context(tls)
    async with served(stage, context) as (_, port):
        verify = ssl.create_default_context(cafile=str(tls.certificate))
        async with httpx2.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=verify) as http:
            body, _, opener = stage.seal()
            answer = await stage.post(http, body=body)
            assert opened(opener, answer.content)
        reader, writer = await dial(port, HEALTH)
        assert not (await reader.read()).startswith(b"HTTP")  # plain HTTP is not answered
        writer.close()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            assert (await asyncio.to_thread(peer_name, port, trust=tls.certificate, at_most=version)).startswith("first TLSv1.")


async def test_a_renewed_certificate(stage: Stage, tmp_path: Path) -> None:
    """What SIGHUP does: new connections see it, and files that do not hold change nothing."""
    tls = certificate(tmp_path, "first")
    context = tls_context(tls)
    async with served(stage, context) as (_, port):
        assert await asyncio.to_thread(peer_name, port, trust=tls.certificate) == "first TLSv1.3"
        certificate(tmp_path, "second")
        load_certificate(context, tls)
        assert await asyncio.to_thread(peer_name, port, trust=tls.certificate) == "second TLSv1.3"
        good = tls.certificate.read_bytes()
        certificate(tmp_path, "third")
        tls.certificate.write_bytes(good)  # the second's certificate with the third's key
        with pytest.raises(SettingsError, match="one key pair"):
            load_certificate(context, tls)
        assert await asyncio.to_thread(peer_name, port, trust=tls.certificate) == "second TLSv1.3"


async def test_a_handshake_that_does_not_come(stage: Stage, tmp_path: Path) -> None:
    """Whoever speaks no TLS has as long as a head: not the minute that is usual."""
    async with served(stage, tls_context(certificate(tmp_path, "first")), header_timeout=0.3) as (_, port):
        reader, writer = await dial(port, b"\x16\x03")
        async with asyncio.timeout(20):
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""
        writer.close()


@pytest.mark.parametrize("limit", ["connections", "connections_per_address"])
async def test_too_many_handshakes(stage: Stage, tmp_path: Path, limit: str) -> None:
    """A handshake takes a place like any connection: the one that takes longest makes room, and its successor is served."""
    tls = certificate(tmp_path, "first")
    async with served(stage, tls_context(tls), **{limit: 3}) as (server, port):
        waiting = [await dial(port, b"\x16\x03") for _ in range(5)]
        async with asyncio.timeout(20):  # well below the patience with a handshake
            for reader, _ in waiting[:2]:
                with contextlib.suppress(ConnectionError):
                    assert await reader.read() == b""
            assert await asyncio.to_thread(peer_name, port, trust=tls.certificate) == "first TLSv1.3"
        assert server.config.door.cut == 3
        for _, writer in waiting:
            writer.close()
        async with asyncio.timeout(20):
            while server.config.door.inside:
                await asyncio.sleep(0.01)


async def test_a_handshake_makes_room_for_its_connection(stage: Stage, tmp_path: Path) -> None:
    """It is not counted twice: with one place, each of many requests is served."""
    tls = certificate(tmp_path, "first")
    verify = ssl.create_default_context(cafile=str(tls.certificate))
    async with served(stage, tls_context(tls), connections=1, connections_per_address=1) as (server, port):
        for _ in range(5):
            async with httpx2.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=verify) as http:
                assert (await http.get("/healthz")).status_code == 200
            while server.config.door.inside:
                await asyncio.sleep(0.01)
        assert server.config.door.cut == 0


async def test_nobody_can_be_accepted(stage: Stage, tmp_path: Path) -> None:
    """Without a file to spare, the listener tries again: it is not lost."""
    tls = certificate(tmp_path, "first")
    failures: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
    async with served(stage, tls_context(tls)) as (_, port):
        dialled = socket.socket()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (dialled.fileno() + 1, hard))
        try:
            await asyncio.to_thread(dialled.connect, ("127.0.0.1", port))
            await asyncio.sleep(0.1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        dialled.close()
        assert await asyncio.to_thread(peer_name, port, trust=tls.certificate) == "first TLSv1.3"
    assert not failures


def test_old_tls_is_refused(tmp_path: Path) -> None:
    assert tls_context(certificate(tmp_path, "first")).minimum_version is ssl.TLSVersion.TLSv1_2


def test_a_key_that_everybody_can_read(tmp_path: Path) -> None:
    tls = certificate(tmp_path, "first")
    tls.key.chmod(0o644)
    with pytest.raises(SettingsError, match="chmod 600"):
        tls_context(tls)


def test_certificate_files_that_are_none(tmp_path: Path) -> None:
    tls = certificate(tmp_path, "first")
    tls.certificate.unlink()
    with pytest.raises(SettingsError, match="certificate's chain"):
        tls_context(tls)


async def test_time_is_what_ends_it(stage: Stage) -> None:
    """A deadline, not a race: a head that comes in time, in pieces, is served."""
    async with served(stage, header_timeout=30) as (_, port):
        reader, writer = await dial(port)
        for at in range(len(HEALTH)):
            writer.write(HEALTH[at : at + 1])
            await writer.drain()
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
