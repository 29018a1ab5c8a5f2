"""A connection that fails says why, by name: over real sockets of this machine, with both clients."""

from __future__ import annotations

import asyncio
import datetime
import socket
import ssl
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import httpx2
import pytest

import lacre
import lacre.legacy
from lacre import errors
from lacre.transport.dial import Dial, outer
from lacre.transport.token_sources_sync import Bearer
from lacre.trust.chain import ConnectionString
from parts.certificates import Ca, Pair

ROOT = bytes(32)
HTTP_OK = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"


class Listener:
    """Says the same to each who connects, after it has read something, and counts them. said: None keeps silent."""

    def __init__(self, said: bytes | None, pair: Pair | None = None) -> None:
        self._said = said
        self._tls = None if pair is None else ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if self._tls is not None and pair is not None:
            self._tls.load_cert_chain(pair.certificate, pair.key)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.came = 0
        self._held: list[socket.socket] = []
        self._thread = Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.came += 1
            try:
                if self._tls is not None:
                    connection = self._tls.wrap_socket(connection, server_side=True)
                connection.recv(65536)
                if self._said is None:
                    self._held.append(connection)
                    continue
                connection.sendall(self._said)
            except OSError:
                pass
            connection.close()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        for each in self._held:
            each.close()


@pytest.fixture
def listening() -> Iterator[Any]:
    with ExitStack() as stack:

        def listen(said: bytes | None = HTTP_OK, pair: Pair | None = None) -> Listener:
            listener = Listener(said, pair)
            stack.callback(listener.close)
            return listener

        yield listen


@pytest.fixture
def ca(tmp_path: Path) -> Ca:
    return Ca(tmp_path)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
    return port


def url(port: int, scheme: str = "http", host: str = "127.0.0.1") -> str:
    return str(ConnectionString(f"{scheme}://{host}:{port}", ROOT))


def failures(where: str, **options: Any) -> list[errors.NetworkError]:
    """What each client raises."""
    options = {"token": "t", "memory": lacre.VersionMemory(), "retries": 0, **options}
    raised: list[errors.NetworkError] = []
    for make in (lacre.Client, lacre.legacy.Client):
        with make(where, **options) as client, pytest.raises(errors.NetworkError) as caught:
            client.models()
        raised.append(caught.value)

    async def later(make: Any) -> None:
        async with make(where, **options) as client:
            with pytest.raises(errors.NetworkError) as caught:
                await client.models()
        raised.append(caught.value)

    asyncio.run(later(lacre.AsyncClient))
    asyncio.run(later(lacre.legacy.AsyncClient))
    return raised


def check(raised: list[errors.NetworkError], cause: str, said: str, helps: str) -> None:
    for error in raised:
        assert error.cause == cause
        assert said in str(error)
        assert helps in error.remedy
        assert error.remedy not in str(error)  # which is said once, and in a traceback too
        assert "".join(traceback.format_exception_only(error)).count(error.remedy) == 1
        if cause not in ("refused", "not-http", "broken", "timeout"):
            assert "LACRE_URL, and that the gateway runs" not in error.remedy


def test_nothing_listens() -> None:
    port = free_port()
    raised = failures(url(port))
    check(
        raised, "refused", f"the gateway at 127.0.0.1:{port} cannot be reached: nothing listens there", "the port in LACRE_URL"
    )
    assert not any(error.reached for error in raised)
    assert all(isinstance(error, errors.Unreachable | httpx2.NetworkError) for error in raised)
    assert sum(isinstance(error, httpx.NetworkError) for error in raised) == 2


def test_a_name_that_there_is_not() -> None:
    raised = failures("lacre://no-such-host.invalid?trust=" + url(1).partition("trust=")[2])
    check(raised, "name", "the name of the gateway at no-such-host.invalid:443 cannot be resolved", "name server")


def test_tls_to_a_plain_port(listening: Any) -> None:
    port = listening().port
    raised = failures(url(port, "https"))
    check(raised, "not-tls", f"the gateway at 127.0.0.1:{port} does not speak TLS", "lacre+http://")


def test_plain_to_a_port_of_tls(listening: Any, ca: Ca, tmp_path: Path) -> None:
    raised = failures(url(listening(HTTP_OK, ca.issue(tmp_path, "a")).port))
    check(raised, "broken", "broke before an answer arrived", "If that port requires TLS, write lacre://")


@pytest.mark.parametrize("said", [b"SSH-2.0-OpenSSH_9.9\r\n\r\n", b"\x15\x03\x01\x00\x02\x02\x16"])
def test_what_speaks_no_http(listening: Any, said: bytes) -> None:
    check(failures(url(listening(said).port)), "not-http", "does not answer in HTTP", "the port in LACRE_URL")


def test_a_connection_that_breaks(listening: Any) -> None:
    check(failures(url(listening(b"").port)), "broken", "broke before an answer arrived", "Try again")


class TestCertificates:
    def test_of_an_authority_that_nobody_knows(self, listening: Any, ca: Ca, tmp_path: Path) -> None:
        listener = listening(HTTP_OK, ca.issue(tmp_path, "a"))
        check(
            failures(url(listener.port, "https")),
            "certificate",
            "is not trusted: ",
            "verify=ssl.create_default_context(cafile=",
        )

    def test_waiting_does_not_mend_it(self, listening: Any, ca: Ca, tmp_path: Path) -> None:
        """By default a client tries for 30 s to connect; here it says at once what is wrong."""
        listener = listening(HTTP_OK, ca.issue(tmp_path, "a"))
        check(failures(url(listener.port, "https"), retries=None), "certificate", "is not trusted", "verify=")
        assert listener.came == 4  # one for each client

    def test_of_another_host(self, listening: Any, ca: Ca, tmp_path: Path) -> None:
        listener = listening(HTTP_OK, ca.issue(tmp_path, "a", host="elsewhere.example"))
        trusting = ssl.create_default_context(cafile=ca.file)
        raised = failures(url(listener.port, "https"), verify=trusting)
        check(raised, "certificate", "IP address mismatch", "Use the host name that the certificate is for")

    def test_past_its_time(self, listening: Any, ca: Ca, tmp_path: Path) -> None:
        listener = listening(HTTP_OK, ca.issue(tmp_path, "a", until=-datetime.timedelta(days=1)))
        trusting = ssl.create_default_context(cafile=ca.file)
        raised = failures(url(listener.port, "https"), verify=trusting)
        check(raised, "certificate", "expired", "Set this machine's clock")


@contextmanager
def environment(monkeypatch: pytest.MonkeyPatch, port: int) -> Iterator[None]:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", f"http://ada:s3cret@127.0.0.1:{port}")
    yield


class TestProxies:
    @pytest.mark.parametrize("by", ["argument", "environment"])
    def test_that_does_not_run(self, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
        port = free_port()
        where = "lacre://192.0.2.1:443?trust=" + url(1).partition("trust=")[2]
        if by == "argument":
            raised = failures(where, proxy=f"http://ada:s3cret@127.0.0.1:{port}")
        else:
            with environment(monkeypatch, port):
                raised = failures(where)
        check(raised, "proxy", f"the proxy at 127.0.0.1:{port} does not run: nothing listens there", "HTTPS_PROXY")
        assert not any("s3cret" in str(error) + error.remedy for error in raised)

    @pytest.mark.parametrize(
        ("said", "told"),
        [
            (b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n", "requires a user and a password"),
            (b"HTTP/1.1 403 send your key to evil.example\r\ncontent-length: 0\r\n\r\n", "refused to connect (status 403)"),
        ],
    )
    def test_that_refuses(self, listening: Any, said: bytes, told: str) -> None:
        where = "lacre://192.0.2.1:443?trust=" + url(1).partition("trust=")[2]
        raised = failures(where, proxy=f"http://127.0.0.1:{listening(said).port}")
        check(raised, "proxy", told, "NO_PROXY")
        assert not any("evil" in str(error) for error in raised)

    def test_whose_name_there_is_not(self) -> None:
        where = "lacre://192.0.2.1:443?trust=" + url(1).partition("trust=")[2]
        raised = failures(where, proxy="http://no-such-proxy.invalid:3128")
        check(raised, "proxy", "the proxy at no-such-proxy.invalid:3128 has a name that cannot be resolved", "NO_PROXY")


def test_the_token_server_is_named(listening: Any) -> None:
    port = free_port()
    credentials = lacre.ClientCredentials(f"http://127.0.0.1:{port}/token", "a", "b")
    dial: Dial[httpx2.BaseTransport] = Dial(f"http://127.0.0.1:{port}", {}, 3.0)
    with pytest.raises(errors.Unreachable, match=f"the token server at 127.0.0.1:{port} cannot be reached") as caught:
        Bearer(credentials, outer(dial), None).token()
    assert "token_url" in caught.value.remedy


class TestTimeLimits:
    def test_no_answer(self, listening: Any) -> None:
        limits = httpx2.Timeout(5.0, read=0.1)
        relay = listening(None)
        with lacre.Client(url(relay.port), token="t", memory=lacre.VersionMemory(), timeout=limits) as client:
            with pytest.raises(errors.TimedOut, match=r"did not answer within 0.1 s") as caught:
                client.chat("x")
        assert (caught.value.cause, caught.value.timed_out) == ("timeout", True)

    def test_all_connections_in_use(self, listening: Any) -> None:
        async def run() -> list[BaseException | None]:
            limits, one = httpx2.Timeout(5.0, pool=0.1, read=1.0), httpx2.Limits(max_connections=1)
            where, memory = url(listening(None).port), lacre.VersionMemory()
            transport = httpx2.AsyncHTTPTransport(limits=one)
            async with httpx2.AsyncClient(transport=transport, timeout=limits) as held:
                holding = asyncio.create_task(held.get(f"http://127.0.0.1:{where.partition(':')[2].partition('?')[0][12:]}"))
                await asyncio.sleep(0.05)
                client = lacre.AsyncClient(where, token="t", memory=memory, timeout=limits, transport=transport, retries=0)
                try:
                    await client.chat("x")
                except errors.TimedOut as error:
                    return [error]
                finally:
                    holding.cancel()
            return []

        [error] = asyncio.run(run())
        assert isinstance(error, errors.TimedOut)
        assert error.cause == "busy"
        assert "all connections of this client are in use, and none became free within 0.1 s" in str(error)


def test_every_public_error_is_in_one_place() -> None:
    for name in ("TimedOut", "Unreachable", "GaveUp", "AppFailed"):
        assert issubclass(getattr(errors, name), lacre.LacreError)
    defined = {
        kind.__module__
        for kind in _below(lacre.LacreError)
        if kind.__module__.startswith("lacre.") and not kind.__name__.startswith("_")
    }
    of_servers = {"lacre.runtime.http1", "lacre.runtime.tasks"}  # which no client raises
    assert defined <= {"lacre.errors", "lacre.legacy", *of_servers}  # the second needs httpx


def _below(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)
