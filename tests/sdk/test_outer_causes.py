"""A connection that fails says why, by name: over real sockets of this machine, with both clients."""

from __future__ import annotations

import asyncio
import datetime
import socketserver
import ssl
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event, Thread
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
from lacre_fabric.operate.nats_server import free_port
from parts.certificates import Ca, Pair

HTTP_OK = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
Listening = Callable[..., "Listener"]


class Listener(socketserver.ThreadingTCPServer):
    """Says the same to each who connects, after it has read something, and counts them. said: None keeps silent."""

    def __init__(self, said: bytes | None, pair: Pair | None) -> None:
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self.said, self.pair, self.came = said, pair, 0
        self.port: int = self.server_address[1]
        self.over = Event()
        self.thread = Thread(target=self.serve_forever, args=[0.05])
        self.thread.start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        self.came += 1
        with ExitStack() as stack:
            stack.enter_context(suppress(OSError))
            if self.pair is not None:
                tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                tls.load_cert_chain(self.pair.certificate, self.pair.key)
                request = stack.enter_context(tls.wrap_socket(request, server_side=True))
            request.recv(65536)
            if self.said is None:
                self.over.wait(30)
            else:
                request.sendall(self.said)

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self.thread.join()
        self.server_close()


@pytest.fixture
def listening() -> Iterator[Listening]:
    with ExitStack() as stack:

        def listen(said: bytes | None = HTTP_OK, pair: Pair | None = None) -> Listener:
            listener = Listener(said, pair)
            stack.callback(listener.close)
            return listener

        yield listen


def url(port: int = 443, scheme: str = "http", host: str = "127.0.0.1") -> str:
    return str(ConnectionString(f"{scheme}://{host}:{port}", bytes(32)))


def failures(where: str, cause: str, said: str, helps: str, **options: Any) -> list[errors.NetworkError]:
    """What each client raises, once it is seen to be told well."""
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

    for make in (lacre.AsyncClient, lacre.legacy.AsyncClient):
        asyncio.run(later(make))
    for error in raised:
        assert error.cause == cause
        assert said in str(error) and helps in error.remedy
        assert error.remedy not in str(error)  # which is said once, and in a traceback too
        assert "".join(traceback.format_exception_only(error)).count(error.remedy) == 1
        if cause not in ("refused", "not-http", "broken", "timeout"):
            assert "LACRE_URL, and that the gateway runs" not in error.remedy
    return raised


def test_nothing_listens() -> None:
    port = free_port()
    says = f"the gateway at 127.0.0.1:{port} cannot be reached: nothing listens there"
    raised = failures(url(port), "refused", says, "the port in LACRE_URL")
    assert not any(error.reached for error in raised)
    assert all(isinstance(error, errors.Unreachable | httpx2.NetworkError) for error in raised)
    assert sum(isinstance(error, httpx.NetworkError) for error in raised) == 2


def test_a_name_that_there_is_not() -> None:
    says = "the name of the gateway at no-such-host.invalid:443 cannot be resolved"
    failures(url(443, "https", "no-such-host.invalid"), "name", says, "name server")


@pytest.mark.parametrize(
    ("said", "cause", "says", "helps"),
    [
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", "not-http", "does not answer in HTTP", "the port in LACRE_URL"),
        (b"\x15\x03\x01\x00\x02\x02\x16", "not-http", "does not answer in HTTP", "the port in LACRE_URL"),
        (b"", "broken", "broke before an answer arrived", "Try again"),
    ],
)
def test_what_speaks_no_http(listening: Listening, said: bytes, cause: str, says: str, helps: str) -> None:
    failures(url(listening(said).port), cause, says, helps)


def test_tls_to_a_plain_port(listening: Listening) -> None:
    port = listening().port
    failures(url(port, "https"), "not-tls", f"the gateway at 127.0.0.1:{port} does not speak TLS", "lacre+http://")


YESTERDAY = -datetime.timedelta(days=1)


@pytest.mark.parametrize(
    ("issued", "trusted", "says", "helps"),
    [
        ({}, False, "is not trusted: ", "verify=ssl.create_default_context(cafile="),
        ({"host": "elsewhere.example"}, True, "IP address mismatch", "Use the host name that the certificate is for"),
        ({"until": YESTERDAY}, True, "expired", "Set this machine's clock"),
    ],
    ids=["an authority that nobody knows", "another host", "past its time"],
)
def test_certificates(
    listening: Listening, tmp_path: Path, issued: dict[str, Any], trusted: bool, says: str, helps: str
) -> None:
    """retries: by default a client tries for 30 s to connect; waiting mends none of these, and it says so at once."""
    ca = Ca(tmp_path)
    listener = listening(HTTP_OK, ca.issue(tmp_path, "a", **issued))
    options = {"verify": ssl.create_default_context(cafile=ca.file)} if trusted else {}
    failures(url(listener.port, "https"), "certificate", says, helps, retries=None, **options)
    assert listener.came == 4  # one for each client


def test_plain_to_a_port_of_tls(listening: Listening, tmp_path: Path) -> None:
    listener = listening(HTTP_OK, Ca(tmp_path).issue(tmp_path, "a"))
    failures(url(listener.port), "broken", "broke before an answer arrived", "If that port requires TLS, write lacre://")


class TestProxies:
    WHERE = url(443, "https", "192.0.2.1")

    @pytest.mark.parametrize("by", ["argument", "environment"])
    def test_that_does_not_run(self, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
        port = free_port()
        proxy = f"http://ada:s3cret@127.0.0.1:{port}"
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        if by == "environment":
            monkeypatch.setenv("HTTPS_PROXY", proxy)
        options = {"proxy": proxy} if by == "argument" else {}
        says = f"the proxy at 127.0.0.1:{port} does not run: nothing listens there"
        raised = failures(self.WHERE, "proxy", says, "HTTPS_PROXY", **options)
        assert not any("s3cret" in str(error) + error.remedy for error in raised)

    @pytest.mark.parametrize(
        ("status", "says"),
        [
            (b"407 Proxy Authentication Required", "requires a user and a password"),
            (b"403 send your key to evil.example", "refused to connect (status 403)"),
        ],
    )
    def test_that_refuses(self, listening: Listening, status: bytes, says: str) -> None:
        port = listening(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\n\r\n").port
        raised = failures(self.WHERE, "proxy", says, "NO_PROXY", proxy=f"http://127.0.0.1:{port}")
        assert not any("evil" in str(error) for error in raised)

    def test_whose_name_there_is_not(self) -> None:
        says = "the proxy at no-such-proxy.invalid:3128 has a name that cannot be resolved"
        failures(self.WHERE, "proxy", says, "NO_PROXY", proxy="http://no-such-proxy.invalid:3128")


def test_the_token_server_is_named() -> None:
    port = free_port()
    credentials = lacre.ClientCredentials(f"http://127.0.0.1:{port}/token", "a", "b")
    dial: Dial[httpx2.BaseTransport] = Dial(f"http://127.0.0.1:{port}", {}, 3.0)
    with pytest.raises(errors.Unreachable, match=f"the token server at 127.0.0.1:{port} cannot be reached") as caught:
        Bearer(credentials, outer(dial), None).token()
    assert "token_url" in caught.value.remedy


class TestTimeLimits:
    def test_no_answer(self, listening: Listening) -> None:
        options: dict[str, Any] = {"memory": lacre.VersionMemory(), "timeout": httpx2.Timeout(5.0, read=0.1)}
        with lacre.Client(url(listening(None).port), token="t", **options) as client:
            with pytest.raises(errors.TimedOut, match=r"did not answer within 0.1 s") as caught:
                client.chat("x")
        assert (caught.value.cause, caught.value.timed_out) == ("timeout", True)

    async def test_all_connections_in_use(self, listening: Listening) -> None:
        port = listening(None).port
        options: dict[str, Any] = {
            "transport": httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=1)),
            "timeout": httpx2.Timeout(5.0, pool=0.1, read=1.0),
        }
        async with httpx2.AsyncClient(**options) as held:
            holding = asyncio.create_task(held.get(f"http://127.0.0.1:{port}"))
            await asyncio.sleep(0.05)
            client = lacre.AsyncClient(url(port), token="t", memory=lacre.VersionMemory(), retries=0, **options)
            told = "all connections of this client are in use, and none became free within 0.1 s"
            with pytest.raises(errors.TimedOut, match=told) as caught:
                await client.chat("x")
            assert caught.value.cause == "busy"
            holding.cancel()


def test_every_public_error_is_in_one_place() -> None:
    for name in ("TimedOut", "Unreachable", "GaveUp", "AppFailed"):
        assert issubclass(getattr(errors, name), lacre.LacreError)
    defined = {kind.__module__ for kind in _below(lacre.LacreError) if not kind.__name__.startswith("_")}
    of_servers = {"lacre.page.door", "lacre.runtime.http1", "lacre.runtime.tasks"}  # which no client raises
    ours = {name for name in defined if name.startswith("lacre.")}
    assert ours <= {"lacre.errors", "lacre.legacy", *of_servers}  # the second needs httpx


def _below(kind: type) -> Iterator[type]:
    for each in kind.__subclasses__():
        yield each
        yield from _below(each)
