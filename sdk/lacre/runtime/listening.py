"""uvicorn's HTTP/1.1, with a bound on everything that a client may send or keep before anybody knows who it is.

    uvicorn service:app --http lacre.runtime.listening:BoundedProtocol

Rules:
- Requests are read by `lacre.runtime.http1`: bounded heads, one reading, no trailers among the fields. What cannot be read is
  answered with a bare status, and the connection ends.
- A head has `head_timeout` seconds to arrive, counted from the connection or from its first byte. So has the rest of a body
  that nobody waits for any more, and it may have `DISCARDED` bytes.
- One request at a time: what a client sends ahead stays unread until its turn, and past `AHEAD` bytes in the network.
- A body stays in the network until the application asks for it, but for what came together with the head.
- No more than `connections` are held, of one address no more than `per_address`, and of bytes that no application asked for no
  more than `held`. Past that, whoever has waited longest with no request under way is cut off; for bytes, whoever has held some
  for longest. An honest head comes in one piece and is never held.
- A client that does not read its answer for `STALLED` seconds is cut off.
"""

from __future__ import annotations

import asyncio
import http
import ipaddress
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast
from urllib.parse import unquote

import uvicorn
from uvicorn.protocols.http.flow_control import FlowControl, service_unavailable
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from lacre.runtime.http1 import Body, RequestHead, RequestReader, UnreadableRequest

AHEAD: Final = 64 * 1024  # bytes of further requests that are kept while one is under way
DISCARDED: Final = 1024 * 1024  # bytes of a body that are read for nobody, so that a client sees why
LINGER: Final = 2.0  # seconds for a client to read its refusal: closing at once might take it away (RFC 9112 section 9.6)
STALLED: Final = 30.0  # seconds; longer than an application's own patience with a stream
# A household or a server gets a whole /64 (RFC 6177): its single addresses are free to change.
_IPV6_PREFIX: Final = 64


class Held(Protocol):
    """A connection, or what will be one. cut: ends it at once, and with it all that it holds."""

    def cut(self) -> None: ...


@dataclass(slots=True)
class Door:
    """What one listener takes, and what it holds now.

    head_timeout: seconds. connections: at a time. per_address: of these, of one address or IPv6 /64; None: as many.
    held: bytes that all connections together may hold of what no application asked for. free: addresses and networks that
    `per_address` is not for, such as a balancer's; `*` is everybody. encoded_slashes: whether a path may hold `%2F`.
    stalled: seconds that a client may leave its answer unread. refused: how many requests could not be read, by status.
    cut: how many connections had to make room.
    """

    head_timeout: float = 15.0
    connections: int = 1000
    per_address: int | None = None
    held: int = 64 * 1024 * 1024
    free: tuple[str, ...] = ()
    encoded_slashes: bool = True
    stalled: float = STALLED
    refused: Counter[int] = field(default_factory=Counter)
    cut: int = 0
    _inside: set[Held] = field(default_factory=set)
    _waiting: dict[Held, None] = field(default_factory=dict)  # the one that waits longest first
    _of_address: dict[str, dict[Held, None]] = field(default_factory=dict)  # all of its connections, oldest first
    _holding: dict[Held, int] = field(default_factory=dict)  # bytes; whoever has held some for longest first
    _held: int = 0

    @property
    def held_now(self) -> int:
        """Bytes that no application asked for so far."""
        return self._held

    @property
    def inside(self) -> int:
        """How many connections there are."""
        return len(self._inside)

    def enter(self, connection: Held, address: str) -> None:
        """It has no request under way so far. To make room for it, another one is cut off, or it itself."""
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
        """It has no request under way from now on."""
        self._waiting[connection] = None

    def works(self, connection: Held) -> None:
        """It has one."""
        self._waiting.pop(connection, None)

    def holds(self, connection: Held, size: int) -> None:
        """size: bytes that no application has asked for, in all."""
        self._held += size - self._holding.get(connection, 0)
        if size:
            self._holding[connection] = size
        else:
            self._holding.pop(connection, None)
        while self._held > self.held:
            self._cut(next(iter(self._holding)))  # which leaves, and holds nothing then

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


def network_of(address: str) -> str:
    """Whom an address stands for: itself, of IPv6 its /64. What is no address stands for itself."""
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
    """uvicorn's, with a door. protocol: the class that serves a connection."""

    def __init__(
        self, app: Any, door: Door, *, protocol: type[BoundedProtocol] | None = None, **options: Any
    ) -> None:  # options: uvicorn's own
        self.door = door
        super().__init__(app, http=protocol or BoundedProtocol, ws="none", **options)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. uvicorn's own protocol, but for how requests are read and how much is kept of them."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = None  # type: ignore[assignment]  # nothing here asks uvicorn's
        self.door = _door_of(config)
        self._reader = RequestReader(encoded_slashes=self.door.encoded_slashes)
        self._deadline: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._unread = False  # whether there is more to come of a message whose head is whole
        self._discarded = 0  # bytes of it that came when nobody waited for them any more
        self._refused = False  # whether it said what cannot be read
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
        """Ends the connection at once, and with it all that it holds."""
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
        """Reads as far as it may: the next head waits for the end of the answer before."""
        try:
            while not self._refused and not (self._busy and self._reader.between) and (event := self._reader.next()):
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
            self.flow.pause_reading()  # until the application has taken what there is, or has answered
        self._account()

    def _begin(self, head: RequestHead) -> None:
        self._end_deadline()
        self._unread, self._discarded = True, 0
        self.door.works(self)
        path = head.path.decode("ascii")
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
        self.cycle = _Cycle(
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
        self.cycle.on_asked = self._account
        crowded = self.limit_concurrency is not None and (
            len(self.connections) >= self.limit_concurrency or len(self.tasks) >= self.limit_concurrency
        )
        self._start_asgi_task(self.cycle, service_unavailable if crowded else self.app)

    def _take(self, content: bytes) -> None:
        if self.cycle.response_complete:
            self._discard(len(content))
        else:
            self.cycle.body += content
            self.cycle.message_event.set()

    def _finish(self) -> None:
        self._unread = False
        if self.cycle.response_complete:
            self._rest()
        else:
            self.flow.resume_reading()  # or nobody would learn that the client left
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def on_response_complete(self) -> None:
        """uvicorn's, and the next request, which may be here already."""
        super().on_response_complete()
        if self.transport.is_closing():  # once the client has taken the last bytes, for which it has as long as for others
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
        cycle = cast("_Cycle | None", self.cycle)
        size = self._reader.pending
        if cycle is not None and not cycle.asked and not cycle.response_complete:
            size += len(cycle.body)
        self.door.holds(self, size)

    # Ends

    def _refuse(self, status: int, reason: str) -> None:
        """Answers what cannot be read, and reads no further but to let the client see it. reason: a fixed text of `http1`."""
        self._refused, self._discarded = True, 0
        self._reader.clear()
        self.door.refused[status] += 1
        self.door.holds(self, 0)
        if self._busy:  # the answer before is under way, or waits for what came instead of a body
            self.cut()
            return
        phrase = http.HTTPStatus(status).phrase
        body = f"{reason}\n".encode()
        fields = f"content-type: text/plain\r\ncontent-length: {len(body)}\r\nconnection: close"
        self.transport.write(f"HTTP/1.1 {status} {phrase}\r\n{fields}\r\n\r\n".encode() + body)
        self._part()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > DISCARDED:
            self.flow.pause_reading()
            self._refused = True
            self._reader.clear()
            self._part()

    def _part(self) -> None:
        """Says that there is no more to come, and gives the client time to see it."""
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
        """uvicorn's; and a client that has not read its answer by now does not keep it for ever."""
        if not self.transport.is_closing():
            self._leave()

    def _leave(self) -> None:
        """Closes, and does not wait for ever for the last bytes to be taken."""
        transport = self.transport
        transport.close()
        self.loop.call_later(LINGER, transport.abort)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.door.stalled, self.transport.abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


class _Flow(FlowControl):
    """Reads on for nobody while a client sends too far ahead."""

    def __init__(self, transport: asyncio.Transport, ahead: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._ahead = ahead

    def resume_reading(self) -> None:
        if not self._ahead():
            super().resume_reading()


class _Cycle(RequestResponseCycle):
    """asked: whether the application has begun to read the body, which is on its account then."""

    asked = False
    on_asked: Callable[[], None]

    async def receive(self) -> Any:
        if not self.asked:
            self.asked = True
            self.on_asked()
        return await super().receive()


def _door_of(config: uvicorn.Config) -> Door:
    """The listener's. Of a plain config, as uvicorn's command line makes it, one with the defaults."""
    door = getattr(config, "door", None)
    if not isinstance(door, Door):
        door = Door()
        config.door = door  # type: ignore[attr-defined]  # it belongs to the server, and that is made of it
    return door
