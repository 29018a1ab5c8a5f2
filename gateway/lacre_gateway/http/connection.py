"""One connection of a gateway's listener. It serves sealed requests itself, and all others through ASGI.

A sealed request costs the gateway some hundred microseconds. The scope, the messages and the layers of ASGI would add a fifth.

Rules:
- `lacre.runtime.listening` bounds what a client may send, for both kinds alike, and reads it with one reader.
- `POST` of exactly the sealed path is a sealed request. Other methods of this path get their answer through ASGI.
- The caller's address is the peer's, or the one that a trusted proxy names: read by the class that reads it for ASGI.
- However a sealed request ends, its connection is told, and its line is logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from lacre import problems
from lacre.runtime import tasks
from lacre.runtime.http1 import RequestHead
from lacre.runtime.listening import BoundedProtocol
from lacre.wire.header import SEALED_PATH
from lacre_gateway.http.access_log import RequestLog
from lacre_gateway.http.clock import Clock
from lacre_gateway.http.exchange import Exchange
from lacre_gateway.http.gathered import GatheredTransport
from lacre_gateway.http.headers import as_address
from lacre_gateway.http.pages import AllowedPages
from lacre_gateway.http.refusal import RawHeaders, Refusal
from lacre_gateway.http.request_ids import RequestIds

if TYPE_CHECKING:
    from lacre_gateway.http.handshakes import Handshake

_SEALED: Final = SEALED_PATH.encode()
_FORWARDED_FOR: Final = b"x-forwarded-for"
_NO_LINGER: Final = struct.pack("ii", 1, 0)  # a close drops what was not sent, and resets the connection
_log: Final = logging.getLogger("lacre_gateway.http")


@dataclass(frozen=True, slots=True)
class SealedRoute:
    """What serves the sealed requests of an app. serve: does the work for one, and answers it. log: gets its line. pages: of
    which origins may read the answers. ids: for its requests.
    """

    serve: Callable[[Exchange], Awaitable[None]]
    log: RequestLog
    clock: Clock
    pages: AllowedPages = field(default_factory=AllowedPages)
    ids: RequestIds = field(default_factory=RequestIds)


class GatewayConnection(BoundedProtocol):
    """Sends the pieces of one turn of the loop together. handshake: the one whose place it takes, with TLS.

    sealed: None if its app serves no sealed requests.
    """

    handshake: Handshake | None = None
    sealed: SealedRoute | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if self.handshake is not None:
            self.handshake.leave()
            self.handshake = None
        super().connection_made(GatheredTransport(transport, self.loop))

    def connection_lost(self, exc: Exception | None) -> None:
        exchange = self._exchange
        if exchange is not None:
            self.cycle = cast("RequestResponseCycle", None)  # each refers to the other: only the collector would free them
            exchange.lost()
        super().connection_lost(exc)

    def resume_writing(self) -> None:
        super().resume_writing()
        if (exchange := self._exchange) is not None:
            exchange.writable()

    @property
    def _exchange(self) -> Exchange | None:
        running: Any = self.cycle
        return running if isinstance(running, Exchange) else None

    def _start(self, head: RequestHead) -> None:
        if self.sealed is None or head.path != _SEALED or head.method != "POST":
            super()._start(head)
            return
        exchange = Exchange(self, head, self._caller(head), self.sealed.ids.next())
        if self.sealed.pages:
            exchange.for_page = self.sealed.pages.fields(head.fields)
        self.cycle = cast("RequestResponseCycle", exchange)  # it has the members that uvicorn uses of one
        exchange.task = task = tasks.spawn("sealed request", _run(self.sealed, exchange))
        self.tasks.add(task)  # which the server waits for when it drains, and cancels in the end
        task.add_done_callback(self.tasks.discard)

    def _caller(self, head: RequestHead) -> str:
        """The caller's address; empty if there is none."""
        host = self.client[0] if self.client else ""
        if isinstance(self.app, ProxyHeadersMiddleware) and host in (proxies := self.app.trusted_hosts):
            named = [value for name, value in head.fields if name == _FORWARDED_FOR]
            if named:
                host = proxies.get_trusted_client_address(b", ".join(named).decode("latin1"))[0] or host
        return as_address(host)

    # What an exchange needs

    @property
    def default_fields(self) -> RawHeaders:
        return self.server_state.default_headers

    @property
    def write_paused(self) -> bool:
        return self.flow.write_paused

    @property
    def draining(self) -> bool:
        return self.door.draining

    def write(self, data: bytes) -> None:
        self.transport.write(data)

    def asked(self) -> None:
        self._account()

    def read_on(self) -> None:
        self.flow.resume_reading()

    def answered(self, *, keep_alive: bool) -> None:
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()

    def break_off(self, *, reset: bool) -> None:
        self.door.waits(self)
        self._end_deadline()
        if reset:
            _reset(self.transport)
            return
        self.transport.close()
        self._deadline = self.loop.call_later(self.door.stalled, self.transport.abort)


def _reset(transport: asyncio.Transport) -> None:
    """Ends a connection so that its client cannot take it for an end in order: `abort` alone may do that."""
    if (known := transport.get_extra_info("socket")) is not None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(known.fileno())) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    transport.abort()


async def _run(sealed: SealedRoute, exchange: Exchange) -> None:
    sealed.clock.add(exchange)
    try:
        await sealed.serve(exchange)
    except asyncio.CancelledError:  # the server ends: its drain took too long
        if exchange.unanswered:
            exchange.refuse_at_once(Refusal(problems.INTERNAL))
    except Exception as exc:  # noqa: BLE001 - the last place on a request's path
        _log.error("sealed request failed", exc_info=exc)
        if exchange.unanswered:  # its refusal failed
            exchange.refuse_at_once(Refusal(problems.INTERNAL))
    finally:
        try:
            sealed.clock.remove(exchange)
            exchange.close()
        finally:
            _tell(sealed.log, exchange)


def _tell(log: RequestLog, exchange: Exchange) -> None:
    log.ended(
        request_id=exchange.request_id,
        method="POST",
        path=SEALED_PATH,
        status=exchange.status,
        whole=exchange.whole,
        since=exchange.since,
        address=exchange.address,
        known=exchange.is_known,
        refused=exchange.refused,
        facts=exchange.facts,
    )
