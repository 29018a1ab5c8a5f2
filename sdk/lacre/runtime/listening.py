"""uvicorn's HTTP/1.1, with a bound on everything that an unknown client may send or keep.

    uvicorn service:app --http lacre.runtime.listening:BoundedProtocol

Rules:
- `lacre.runtime.http1` reads requests: bounded heads, one reading, no trailers among the fields. An unreadable request gets a
  bare status, and its connection ends.
- A head has `head_timeout` seconds to arrive, counted from the connection or from its first byte. The unread rest of a body has
  the same time, and may have `DISCARDED` bytes.
- One request at a time: a further request stays unread until its turn, and past `AHEAD` bytes it stays in the network.
- A body stays in the network until the application asks for it, except the bytes that arrived with the head.
- At most `connections` are open, at most `per_address` from one address, and at most `held` bytes are kept that no application
  asked for. Past the first two limits, the connection that has waited longest without a running request is cut. Past `held`,
  the one that has held bytes for longest is cut. An honest head arrives in one piece and is never held.
- A client that does not read its answer for `STALLED` seconds is cut.
- While the listener drains, each answer that begins says `Connection: close`. Otherwise a client may send its next request into
  a connection that ends.
"""

from __future__ import annotations

import asyncio
import http
import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Final, Protocol, cast
from urllib.parse import unquote

import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl, service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from lacre.runtime.http1 import Body, RequestHead, RequestReader, UnreadableRequest

AHEAD: Final = 64 * 1024  # bytes of further requests that are kept while one is running
DISCARDED: Final = 1024 * 1024  # bytes of a body that are read and dropped, so that the client reads its refusal
LINGER: Final = 2.0  # seconds for a client to read its refusal: closing at once might destroy it (RFC 9112 section 9.6)
STALLED: Final = 30.0  # seconds; longer than an application's own patience with a stream
# A household or a server gets a whole /64 (RFC 6177) and can change its address within it at will.
_IPV6_PREFIX: Final = 64


class Held(Protocol):
    """A present or future connection. cut: ends it at once, with all that it holds."""

    def cut(self) -> None: ...


class Cycle(Protocol):
    """A request from its head to the end of its answer. It holds its body's bytes until they are asked for.

    body: the bytes that arrived since they were last taken out. asked: whether any were asked for; they then count as the
    server's own. response_complete: whether all of the answer was written.
    """

    body: bytearray
    asked: bool

    @property
    def response_complete(self) -> bool: ...

    def take(self, content: bytes) -> None:
        """More of the body has arrived."""

    def finish(self) -> None:
        """The body is whole."""


@dataclass(slots=True)
class Door:
    """The limits of one listener, and what it holds now.

    head_timeout: seconds. connections: at a time. per_address: of these, from one address or IPv6 /64; None: no limit. held:
    bytes that all connections together may hold and no application asked for. free: addresses and networks without
    `per_address`, such as a balancer's; `*` means all. encoded_slashes: whether a path may hold `%2F`. stalled: seconds that a
    client may leave its answer unread. draining: whether the listener is about to close. refused: how many requests could not
    be read, by status. cut: how many connections were cut to make room.
    """

    head_timeout: float = 15.0
    connections: int = 1000
    per_address: int | None = None
    held: int = 64 * 1024 * 1024
    free: tuple[str, ...] = ()
    encoded_slashes: bool = True
    stalled: float = STALLED
    draining: bool = False
    refused: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    _inside: set[Held] = field(default_factory=set)
    _waiting: dict[Held, None] = field(default_factory=dict)  # the one that has waited longest first
    _of_address: dict[str, dict[Held, None]] = field(default_factory=dict)  # all of its connections, oldest first
    _holding: dict[Held, int] = field(default_factory=dict)  # bytes; the connection that has held some for longest first
    _held: int = 0

    @property
    def held_now(self) -> int:
        """Bytes that no application asked for yet."""
        return self._held

    @property
    def inside(self) -> int:
        """How many connections are open."""
        return len(self._inside)

    def enter(self, connection: Held, address: str) -> None:
        """Adds a connection without a running request. If there is no room, another one is cut, or this one."""
        self._inside.add(connection)
        self._waiting[connection] = None
        if len(self._inside) > self.connections:
            self._cut(next(iter(self._waiting)))
        if self.per_address is None or self._is_free(address):
            return
        own = self._of_address.setdefault(network_of(address), {})
        own[connection] = None
        if len(own) > self.per_address:
            self._cut(next((each for each in own if each in self._waiting), connection))

    def leave(self, connection: Held, address: str) -> None:
        """Idempotent."""
        self._inside.discard(connection)
        self._waiting.pop(connection, None)
        self._held -= self._holding.pop(connection, 0)
        network = network_of(address)
        own = self._of_address.get(network)
        if own is not None:
            own.pop(connection, None)
            if not own:
                del self._of_address[network]

    def waits(self, connection: Held) -> None:
        """The connection now has no running request."""
        self._waiting[connection] = None

    def works(self, connection: Held) -> None:
        """The connection now has a running request."""
        self._waiting.pop(connection, None)

    def holds(self, connection: Held, size: int) -> None:
        """size: all bytes of the connection that no application has asked for."""
        self._held += size - self._holding.get(connection, 0)
        if size:
            self._holding[connection] = size
        else:
            self._holding.pop(connection, None)
        while self._held > self.held:
            self._cut(next(iter(self._holding)))  # this connection leaves, and then holds nothing

    def _cut(self, connection: Held) -> None:
        self.cut += 1
        connection.cut()

    def _is_free(self, address: str) -> bool:
        if not address or "*" in self.free or address in self.free:
            return True
        try:
            parsed = ipaddress.ip_address(address)
            return any(parsed in ipaddress.ip_network(each, strict=False) for each in self.free)
        except ValueError:
            return False


@lru_cache(maxsize=1024)
def network_of(address: str) -> str:
    """The network that an address counts for: itself, or for IPv6 its /64. Other text counts for itself."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
    return str(parsed)


class BoundedConfig(uvicorn.Config):
    """uvicorn's, with a `Door`. protocol: the class that serves a connection."""

    def __init__(
        self, app: Any, door: Door, *, protocol: type[BoundedProtocol] | None = None, **options: Any
    ) -> None:  # options: uvicorn's own
        self.door = door
        super().__init__(app, http=protocol or BoundedProtocol, ws="none", **options)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It differs from uvicorn's own protocol in how requests are read and how much of them is kept."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser, self.pipeline = None, ()  # type: ignore[assignment]  # uvicorn's own reader, which nothing here uses
        self.door = _door_of(config)
        self._reader = RequestReader(encoded_slashes=self.door.encoded_slashes)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._unread = False  # whether more is to come of a message whose head is whole
        self._discarded = 0  # bytes of it that arrived when no application waited for them
        self._refused = False  # whether the refusal of an unreadable request was sent
        self._address = ""

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, lambda: self._busy and self._reader.between and self._reader.pending > AHEAD)
        self._address = self.client[0] if self.client else ""
        self._set_deadline(self.door.head_timeout)
        self.door.enter(self, self._address)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def cut(self) -> None:
        """Ends the connection at once, with all that it holds."""
        self._forget()
        self.transport.abort()

    def _forget(self) -> None:
        self.door.leave(self, self._address)
        self._reader.clear()
        self._end_deadline()
        self.resume_writing()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self._refused:
            self._discard(len(data))
            return
        self._reader.feed(data)
        self._advance()
        if not self._busy and not self.transport.is_closing():
            self._set_deadline(self.door.head_timeout)

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    # Requests

    def _advance(self) -> None:
        """Reads as far as allowed: the next head waits for the end of the answer before."""
        try:
            while not (self._reader.between and self._busy) and not self._refused and (event := self._reader.next()):
                if isinstance(event, RequestHead):
                    self._begin(event)
                elif isinstance(event, Body):
                    self._take(event.content)
                else:
                    self._finish()
        except UnreadableRequest as exc:
            self._refuse(exc.status, str(exc))
            return
        if self._busy and (self.cycle.body if self._unread else self._reader.pending > AHEAD):
            self.flow.pause_reading()  # until the application has taken these bytes, or has answered
        self._account()

    def _begin(self, head: RequestHead) -> None:
        self._end_deadline()
        self._unread, self._discarded = True, 0
        self.door.works(self)
        self._start(head)

    def _start(self, head: RequestHead) -> None:
        """Begins to serve a request. It sets `cycle`: an ASGI application here; see `Cycle` for what else may serve it."""
        path = head.path.decode()
        self.scope = {
            "type": "http",
            "asgi": {"version": self.asgi_version, "spec_version": "2.3"},
            "http_version": head.version,
            "server": self.server,
            "client": self.client,
            "scheme": self.scheme,  # type: ignore[typeddict-item]  # it is set when a connection is made
            "method": head.method,
            "root_path": self.root_path,
            "path": self.root_path + (unquote(path) if "%" in path else path),
            "raw_path": self.root_path.encode("ascii") + head.path,
            "query_string": head.query,
            "headers": head.fields,
            "state": self.app_state.copy(),
        }
        self.cycle = cycle = _Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=head.expects,
            keep_alive=head.keep_alive,
            on_response=self.on_response_complete,
        )
        cycle.on_asked, cycle.door = self._account, self.door
        crowded = self.limit_concurrency is not None and (
            len(self.connections) >= self.limit_concurrency or len(self.tasks) >= self.limit_concurrency
        )
        self._start_asgi_task(cycle, service_unavailable if crowded else self.app)

    @property
    def _running(self) -> Cycle:
        return cast("Cycle", self.cycle)

    def _take(self, content: bytes) -> None:
        if self._running.response_complete:
            self._discard(len(content))
        else:
            self._running.take(content)

    def _finish(self) -> None:
        self._unread = False
        if self._running.response_complete:
            self._rest()
        else:
            self.flow.resume_reading()  # otherwise nothing would notice that the client left
            self._running.finish()

    def on_response_complete(self) -> None:
        """As uvicorn does; then reads the next request, which may be here already."""
        super().on_response_complete()
        if self.transport.is_closing():  # after the client has taken the last bytes; it has as long for them as for others
            self.door.waits(self)
            self._end_deadline()
            self._deadline = self.loop.call_later(self.door.stalled, self.transport.abort)
            return
        if self._unread:
            self.door.waits(self)
            self._set_deadline(self.door.head_timeout)
        else:
            self._rest()
        if self._reader.pending:
            self._unset_keepalive_if_required()
            self._advance()
            if not self._busy and not self.transport.is_closing():
                self._set_deadline(self.door.head_timeout)

    def _rest(self) -> None:
        """Between an answer and the next request."""
        self._end_deadline()
        self.door.waits(self)

    def _account(self) -> None:
        if self.transport.is_closing():
            return
        running = cast("Cycle | None", self.cycle)
        size = self._reader.pending
        if running is not None and not running.asked and not running.response_complete:
            size += len(running.body)
        self.door.holds(self, size)

    # Ends

    def _refuse(self, status: int, reason: str) -> None:
        """Refuses an unreadable request, and reads on only to let the client see that. reason: a fixed text of `http1`."""
        self._refused, self._discarded = True, 0
        self._reader.clear()
        self.door.refused[status] += 1
        self.door.holds(self, 0)
        if self._busy:  # its body is not one, and nobody could tell where an answer to it would end
            self._forget()
            self._leave()  # with the answers before, which may be on their way
            return
        body = f"{reason}\n".encode()
        fields = f"content-type: text/plain\r\ncontent-length: {len(body)}\r\nconnection: close"
        self.transport.write(f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{fields}\r\n\r\n".encode() + body)
        self._part()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > DISCARDED:
            self.flow.pause_reading()
            self._refused = True
            self._reader.clear()
            self._part()

    def _part(self) -> None:
        """Ends the sending side, and gives the client time to see it."""
        self._unset_keepalive_if_required()
        self._end_deadline()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_deadline(LINGER)

    def _set_deadline(self, seconds: float) -> None:
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(seconds, self._give_up)

    def _end_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self._refused:
            self.cut()
            return
        if not self._unread:
            self.door.refused[408] += 1
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        self._refused, self._discarded = True, 0
        self._reader.clear()
        self.door.holds(self, 0)
        self._part()

    def timeout_keep_alive_handler(self) -> None:
        """As uvicorn does; and a client that has not read its answer by now is cut in time."""
        if not self.transport.is_closing():
            self._leave()

    def _leave(self) -> None:
        """Closes, and limits the wait for the last bytes to be taken."""
        self.transport.close()
        self.loop.call_later(LINGER, self.transport.abort)

    def pause_writing(self) -> None:
        """The client reads more slowly than its answer is made."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.door.stalled, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class _Flow(FlowControl):
    """Reads and drops bytes while a client sends too far ahead."""

    def __init__(self, transport: asyncio.Transport, ahead: Callable[[], bool]) -> None:
        self._transport = transport
        self.read_paused = self.write_paused = False
        self._ahead = ahead

    @cached_property
    def _is_writable_event(self) -> asyncio.Event:  # type: ignore[override]  # most connections need none
        event = asyncio.Event()
        if not self.write_paused:
            event.set()
        return event

    def resume_reading(self) -> None:
        if not self._ahead():
            super().resume_reading()


class _Cycle(RequestResponseCycle):
    """asked: whether the application has begun to read the body, whose bytes then count as its own."""

    asked = False
    on_asked: Callable[[], None]
    door: Door

    async def send(self, message: Any) -> None:
        if self.door.draining and not self.response_started:
            self.keep_alive = False  # uvicorn then adds the header, and closes after the answer
        await super().send(message)

    def take(self, content: bytes) -> None:
        self.body += content
        self.message_event.set()

    def finish(self) -> None:
        self.more_body = False
        self.message_event.set()

    async def receive(self) -> Any:
        if not self.asked:
            self.asked = True
            self.on_asked()
        return await super().receive()


def _door_of(config: uvicorn.Config) -> Door:
    """The listener's door. A plain config, as uvicorn's command line makes it, gets one with the defaults."""
    door = getattr(config, "door", None)
    if not isinstance(door, Door):
        door = Door()
        config.door = door  # type: ignore[attr-defined]  # one config makes one server, so the door belongs to it
    return door
