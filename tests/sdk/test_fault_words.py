"""Why a connection failed, in the words of a server's log: real failures, each with its cause and what helps."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import httpx2
import pytest

from lacre.transport.fault_words import fault_in_words
from parts.certificates import DAY, Ca

CA = "the issuer's `ca`"


def asked(url: str, **options: object) -> str:
    with httpx2.Client(timeout=0.5, **options) as client:  # type: ignore[arg-type]
        with pytest.raises(httpx2.TransportError) as caught:
            client.get(url)
    return fault_in_words(caught.value, CA)


def closed_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
    return port


def answering(reply: Callable[[socket.socket], object], ask: Callable[[int], str]) -> str:
    """What `ask` is told of a server that does this with its first connection."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with closing(peer):
                with suppress(OSError):
                    reply(peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return ask(listener.getsockname()[1])
        finally:
            thread.join()


def test_nothing_listens() -> None:
    assert asked(f"http://127.0.0.1:{closed_port()}/").startswith("nothing listens there")


def test_no_name() -> None:
    assert asked("http://no-such-host.invalid/").startswith("its name cannot be resolved")


def test_no_answer_in_time() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        assert asked(f"http://127.0.0.1:{listener.getsockname()[1]}/").startswith("it does not answer in time")
    assert fault_in_words(TimeoutError()).startswith("it does not answer in time")


def test_no_http_and_no_tls() -> None:
    def ssh(peer: socket.socket) -> None:
        peer.recv(1000)
        peer.sendall(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")

    assert answering(ssh, lambda port: asked(f"http://127.0.0.1:{port}/")).startswith("it does not answer in HTTP")
    assert answering(ssh, lambda port: asked(f"https://127.0.0.1:{port}/")) == "it does not speak TLS on that port"


def test_a_connection_that_breaks() -> None:
    def reset(peer: socket.socket) -> None:
        peer.recv(1000)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    assert answering(reset, lambda port: asked(f"http://127.0.0.1:{port}/")) == "it broke the connection"


def test_without_httpx() -> None:
    async def connect() -> None:
        await asyncio.open_connection("127.0.0.1", closed_port())

    with pytest.raises(OSError) as caught:
        asyncio.run(connect())
    assert fault_in_words(caught.value).startswith("nothing listens there")


@pytest.mark.parametrize(
    ("days", "host", "trusted", "said"),
    [
        (30, "localhost", False, f"its certificate is not signed by a trusted CA: set {CA} to the CA that signed it"),
        (-1, "localhost", True, "its certificate is not valid now: renew it on that server, or correct this machine's clock"),
        (30, "other.example", True, "its certificate is for another host: use a name of the certificate"),
    ],
)
def test_certificates(days: int, host: str, trusted: bool, said: str, tmp_path: Path) -> None:
    authority = Ca(tmp_path)
    pair = authority.issue(tmp_path, "server", host, days * DAY)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pair.certificate, pair.key)
    context = ssl.create_default_context(cafile=authority.file if trusted else None)

    def tls(peer: socket.socket) -> None:
        server.wrap_socket(peer, server_side=True)

    assert answering(tls, lambda port: asked(f"https://localhost:{port}/", verify=context)).startswith(said)


def test_a_text_of_the_peer_is_not_repeated() -> None:
    assert "secret" not in fault_in_words(httpx2.RemoteProtocolError("secret"))
