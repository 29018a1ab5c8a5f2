"""Sockets, TLS, and what uvicorn does not bound by itself: how long a head may take, and how many connections there are.

Rules:
- A request's head has `header_timeout` seconds to arrive, counted from the connection or from its first byte. So has the rest
  of a body that nobody waits for any more.
- No more than `connections` are held: past that, whoever has waited longest with no request under way is cut off, be it half
  a head or nothing at all. A request under way is never what has to go.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import stat
from collections.abc import Iterator
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lacre.errors import SettingsError
from lacre_gateway.exchange import App
from lacre_gateway.gathered import GatheredTransport
from lacre_gateway.settings import Listen, Tls

_BACKLOG: Final = 2048  # connections that the kernel holds while the process is busy
_KEEP_ALIVE: Final = 75  # seconds; longer than a client's own limit, so that it is the client who closes
_ABORT_LIMIT: Final = 5.0  # seconds for aborted requests to cancel their work and record their outcome
OTHER_FILES: Final = 512  # descriptors for everything that is no caller's connection
_TOO_LATE: Final = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def bind(listen: Listen, *, shared: bool = False) -> socket.socket:
    """The listening socket. shared: other processes listen on the same port. Raises SettingsError."""
    listener = reserve(listen, shared=shared)
    listener.listen(_BACKLOG)  # from here on connections wait in the kernel until they are served
    listener.setblocking(False)
    return listener


def reserve(listen: Listen, *, shared: bool = False) -> socket.socket:
    """A socket that holds the address and does not listen. Raises SettingsError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as exc:
        raise SettingsError(
            f"listen: cannot listen on {listen.host} port {listen.port} ({exc.strerror}): free it, or name another"
        ) from exc
    return listener


def allow_connections(count: int) -> None:
    """Raises this process's limit of open files as far as so many connections need it, and the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))


def room_for(count: int) -> int:
    """How many connections this process can hold, `count` at most: one that cannot be accepted would lock everybody out."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return count if soft == resource.RLIM_INFINITY else max(1, min(count, soft - OTHER_FILES))


def tls_context(tls: Tls) -> ssl.SSLContext:
    """TLS 1.2 or newer, with the certificate that is in the files now. Raises SettingsError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_certificate(context, tls)
    return context


def load_certificate(context: ssl.SSLContext, tls: Tls) -> None:
    """Connections from now on are served with what is in the files now. Raises SettingsError, and changes nothing then."""
    try:
        if stat.S_IMODE(tls.key.stat().st_mode) & stat.S_IRWXO:
            raise SettingsError(f"listen.tls.key: {tls.key} can be read by everybody: chmod 600 {tls.key}")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key)  # a try on one that serves nobody
        context.load_cert_chain(tls.certificate, tls.key)
    except OSError as exc:  # ssl.SSLError is one
        reason = "they are no PEM files of one key pair" if isinstance(exc, ssl.SSLError) else exc.strerror
        raise SettingsError(
            f"listen.tls: cannot use {tls.certificate} with {tls.key} ({reason}): write the certificate's chain and its key"
        ) from exc


class Config(uvicorn.Config):
    """waiting: connections without a request under way, the one that waits longest first."""

    def __init__(self, app: App, listen: Listen, context: ssl.SSLContext | None) -> None:
        self.header_timeout = listen.header_timeout
        self.connections = room_for(listen.connections)
        self.waiting: dict[PatientProtocol, None] = {}
        super().__init__(
            app,
            http=PatientProtocol,
            ws="none",
            lifespan="off",
            loop="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=bool(listen.trusted_proxies),
            forwarded_allow_ips=list(listen.trusted_proxies),
            timeout_graceful_shutdown=listen.drain,
            timeout_keep_alive=_KEEP_ALIVE,
            backlog=_BACKLOG,
            ssl_context_factory=None if context is None else lambda _config, _default: context,
        )


class PatientProtocol(HttpToolsProtocol):
    """uvicorn's protocol, with an end to its patience."""

    config: Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._unread = False  # whether there is more to come of a message whose head is whole

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(GatheredTransport(transport, self.loop))
        self.config.waiting[self] = None
        self._set_deadline()
        if len(self.connections) > self.config.connections:
            oldest = next(iter(self.config.waiting))
            del self.config.waiting[oldest]
            oldest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.config.waiting.pop(self, None)
        self._end_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # uvicorn's own patience with an idle connection ended with these bytes, whatever they were.
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._set_deadline()

    def on_headers_complete(self) -> None:
        self._end_deadline()
        self._unread = True
        self.config.waiting.pop(self, None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._unread = False
        if self.cycle.response_complete:
            self._end_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.config.waiting[self] = None
        if self._unread:
            self._set_deadline()

    def _set_deadline(self) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.config.header_timeout, self._give_up)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            if not self._unread:
                self.transport.write(_TOO_LATE)
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn would raise a signal again at the end, before our own parts are closed: who runs it handles them instead."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def settle(self) -> None:
        """Waits for the requests that the end of `serve` aborted."""
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_ABORT_LIMIT)


def make_server(app: App, listen: Listen, context: ssl.SSLContext | None = None) -> Server:
    """context: None serves plain HTTP."""
    return Server(Config(app, listen, context))
