"""nats-py's client with our own reader. No message can end it, and a silent connection counts as lost.

Rules:
- An exception while handling one message affects only that message. It is counted and logged at intervals. See `_process_msg`.
- A read loop that ends for any other reason reconnects at once.
- `is_connected` means that messages flow. The client pings the server once a second. It reconnects after `MAX_SILENT` checks
  without a byte, or if its read loop or reconnection task has died.
- Messages that `publish_directly` gets in one turn of the loop leave in one write. While the connection is down, or a server
  does not read, the library keeps messages within its own limit.
- A sender of useless messages is read more slowly: a flood gets a fifth of the event loop's time. The server then closes this
  connection and no other.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

from lacre.errors import InvalidMessage
from lacre_fabric.nats import protocol
from lacre_fabric.nats.incoming import Incoming, Receive
from lacre_fabric.nats.login import Login
from lacre_fabric.nats.protocol import Control, Event, NatsMessage, Oversized
from lacre_fabric.nats.servers import HungUp, NoTls, Trust

CLOSE_TIMEOUT: Final = 1.0  # seconds for a server to close
LOOK: Final = 1.0  # seconds between checks whether anything arrived
# Checks without a byte, each with a ping, until the server counts as gone. Shorter than a caller waits, longer than a loaded
# machine needs to answer.
MAX_SILENT: Final = 5
TELL_EVERY: Final = 10.0  # seconds between log lines about unusable messages
PENALTY: Final = 4.0  # reading pauses for this multiple of the time that useless messages took
MAX_PENALTY: Final = 0.5  # seconds per pause; well below what counts as silence
RETRY: Final = 1.0  # seconds until a reconnection that failed unexpectedly is retried
_MAX_UNSENT: Final = 2 * 2**20  # bytes that wait for a server to read them, besides the library's own as many
_FIRST: Final = 2**20  # bytes; more than the library's stream keeps
_PING: Final = b"PING\r\n"

log = structlog.get_logger("lacre.fabric")

# Arguments: subject, headers as on the wire, payload. Returns whether the message was of use. Called on the event loop.
Take = Callable[[str, bytes, bytes], bool]


class NatsTransport(TcpTransport):
    """Closes the connection after a failed handshake. The library would wait forever for a stream that the handshake had taken
    over. It would also wait half a minute for the TLS close of a frozen server.

    ending: the client closes. The library then flushes what waits for the next connection into the lost one, which fails.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library has none
        self._aborted = self.ending = False

    async def connect(self, *arguments: Any, **options: Any) -> None:
        if self._io_writer is not None:  # left by a failed attempt; the library would leave it to the garbage collector
            self._io_writer.transport.abort()
        self._aborted = self.ending = False
        await super().connect(*arguments, **options)

    async def connect_tls(self, *arguments: Any, **options: Any) -> None:
        plain = self._io_writer
        try:
            await super().connect_tls(*arguments, **options)
        except BaseException:
            self._aborted = True
            if plain is not None:
                plain.transport.abort()
            raise
        # The library makes the stream by hand. At the end of TLS it would ask to stay half open, and asyncio would warn.
        stream = None if self._io_writer is None else self._io_writer.transport.get_protocol()
        if isinstance(stream, asyncio.StreamReaderProtocol):
            stream._over_ssl = True  # type: ignore[attr-defined]  # as asyncio's own streams do

    async def read_all(self, receive: Receive) -> None:
        """Passes all that arrives on, until the end of the stream. Raises what `receive` raises."""
        first = await self.read(_FIRST)  # all that the library's stream has
        writer = self._io_writer
        if first and writer is not None:
            transport = cast("asyncio.Transport", writer.transport)
            stream = cast("asyncio.Protocol", transport.get_protocol())
            over: bool = self.at_eof()  # type: ignore[no-untyped-call]  # as above
            await Incoming(transport, stream, receive, over=over).run(first)

    def writelines(self, payload: list[bytes]) -> None:
        if not self._is_over():
            super().writelines(payload)  # type: ignore[no-untyped-call]  # as above

    async def drain(self) -> None:
        try:
            if not self._is_over():
                await super().drain()  # type: ignore[no-untyped-call]  # as above
        except (OSError, RuntimeError):  # it was lost just now
            if not self.ending:
                raise

    def _is_over(self) -> bool:
        return self.ending and (self._io_writer is None or self._io_writer.is_closing())

    async def wait_closed(self) -> None:
        if not self._aborted:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await super().wait_closed()  # type: ignore[no-untyped-call]  # as above

    def __bool__(self) -> bool:
        return True  # otherwise the library replaces it while it is not connected


@dataclass(slots=True)
class _Tally:
    """How many events of a chunk were handled, how many of them were useless, and when that began."""

    began: float
    number: int
    useless: int


class DirectClient(Client):
    """Passes messages of some subscriptions on as they are parsed: subject, headers as on the wire, payload.

    The library's own path uses a dictionary of headers, a queue and a task per message. That costs a gateway more than
    everything else it does with a message.

    keep: bytes of the longest useful message; longer ones are dropped on arrival. look: seconds, as `LOOK`. unusable: how many
    messages were too long, malformed, or raised an exception in their handler. trust, login: the certificates and the
    password for each handshake.
    """

    def __init__(
        self, keep: int = protocol.MAX_SIZE, *, look: float = LOOK, trust: Trust | None = None, login: Login | None = None
    ) -> None:
        super().__init__()
        self._trust = trust
        self._login = login
        self._look = look
        self._direct: dict[int, Take] = {}
        self._transport = NatsTransport()
        self._reader = protocol.ProtocolReader(keep)
        self._ps = self._reader  # type: ignore[assignment]  # the library itself calls only `reset` of its parser
        self._outgoing: list[bytes] = []  # messages of this turn
        self._outgoing_size = 0
        self._heard = 0  # chunks received
        self._tell_at = 0.0
        self.unusable = 0

    async def subscribe_directly(self, subject: str, take: Take, *, group: str = "") -> Subscription:
        """take: called on the event loop for each message; see `Take`. group: only one subscriber of it gets each message."""
        subscription = await self.subscribe(subject, group)
        self._direct[subscription._id] = take
        return subscription

    async def leave(self, subscription: Subscription) -> None:
        """Unsubscribes, and hears what is on its way until then: the library drops it."""
        await self._send_unsubscribe(subscription._id)
        await self.flush()
        await self.flush()
        await subscription.unsubscribe()

    async def publish_directly(self, subject: str, payload: bytes, *, reply: str = "", headers: Mapping[str, str]) -> None:
        """As `publish`, without the library's queue, future and task for each message. Raises nats.errors.Error."""
        if not self.is_connected or self._unsent() > _MAX_UNSENT or len(payload) > self._max_payload:
            await self.publish(subject, payload, reply=reply, headers=dict(headers))
            return
        message = protocol.encode_publish(subject, payload, reply=reply, headers=headers)
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._send)
        self._outgoing.append(message)
        self._outgoing_size += len(message)
        self.stats["out_msgs"] += 1
        self.stats["out_bytes"] += len(payload)

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        """The library swallows a cancellation here, and the cancelled task would run on."""
        task = asyncio.current_task()
        before = 0 if task is None else task.cancelling()
        flushed = await super()._flush_pending(force_flush)
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError
        return flushed

    def _unsent(self) -> int:
        """Bytes that the system has not taken yet. The library's queue must be empty, or later messages would overtake it."""
        writer = self._transport._io_writer  # type: ignore[union-attr]  # as above
        if self._pending or writer is None:
            return _MAX_UNSENT + 1
        waiting: int = writer.transport.get_write_buffer_size()
        return waiting + self._outgoing_size

    def _send(self) -> None:
        outgoing, size = self._outgoing, self._outgoing_size
        self._outgoing, self._outgoing_size = [], 0
        if not outgoing:  # one of the library's commands took them along
            return
        try:
            if self.is_connected:
                self._transport.write(b"".join(outgoing))  # type: ignore[union-attr]  # as above
                return
        except (OSError, RuntimeError, AttributeError):  # as in `_pinged`
            pass
        self._pending += outgoing  # sent after the next connection
        self._pending_data_size += size

    # The library's own commands follow the messages before them

    async def _send_command(self, cmd: bytes, priority: bool = False) -> None:
        if self._outgoing:
            self._send()
        await super()._send_command(cmd, priority)

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        if self._outgoing:
            self._send()
        await super()._send_ping(future)

    async def close(self) -> None:
        if self._outgoing:
            self._send()
        self._transport.ending = True  # type: ignore[union-attr]  # it is ours
        await super().close()

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._direct.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    # The connection

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """The library asks for each handshake, also when it reconnects: the files may have been renewed."""
        if self._trust is not None:
            self._trust.refresh()
            if self._trust.value is not None:
                return self._trust.value
        return super().ssl_context

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Runs before the client sends anything. For `tls://` the server must require TLS.

        The library would trust an unencrypted message, which anyone can forge, that the server has no TLS. It would then send
        the password in the clear.
        """
        server = self._current_server
        if initial_connection and server is not None and server.uri.scheme == "tls" and not info.get("tls_required"):
            raise NoTls
        if isinstance(limit := info.get("max_payload"), int):
            self._max_payload = limit  # an account may have a smaller limit than the server, announced after the password
        await super()._process_info(info, initial_connection)

    async def _process_connect_init(self) -> None:
        """Cleans up after a failed attempt. The library also takes it for a connection if the server hangs up instead of
        answering.
        """
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):  # of a failed attempt
            if task is not None:
                task.cancel()
        self._reader.reset()
        if self._login is not None:
            credential = self._login.next()
            self.options |= {"user": credential.name, "password": credential.password}
        try:
            await super()._process_connect_init()
        except ConnectionError as exc:
            raise HungUp from exc
        if not self.is_connected:
            raise HungUp
        if self._login is not None:
            self._login.accepted()

    async def _process_err(self, err_msg: str) -> None:
        """Ends the connection for good only if the server rejects the credential and its file has no other.

        The library does so for every error.
        """
        said = err_msg.lower()
        replaced = self.is_connected and self._login is not None and self._login.has_other()
        if ("authorization violation" in said and not replaced) or "permissions violation" in said:
            await super()._process_err(said)
        else:
            await self._process_op_err(nats.errors.Error(f"nats: {said}"))

    async def _process_pong(self) -> None:
        """Ignores a pong whose caller has given up. The library would end its read loop."""
        if self._pongs:
            waiting = self._pongs.pop(0)
            if not waiting.done():
                waiting.set_result(True)

    async def _attempt_reconnect(self) -> None:
        """Retries until connected or closed. An unexpected exception would leave the library in between."""
        while True:
            try:
                await super()._attempt_reconnect()
            except Exception as exc:  # noqa: BLE001 - it is logged and retried
                if self.is_closed:
                    return
                log.error("fabric.reconnecting_failed", kind=type(exc).__name__)
                self._status = Client.RECONNECTING
                await asyncio.sleep(RETRY)
            else:
                return

    async def _ping_interval(self) -> None:
        """Checks whether anything arrived. A late check counts once: this process itself stood still."""
        silent, heard = 0, self._heard
        while True:
            await asyncio.sleep(self._look)
            if not self.is_connected:
                return  # the next connection has its own task
            if self._heard != heard:
                silent, heard = 0, self._heard
                continue
            silent += 1
            if silent > MAX_SILENT or self._reading_task is None or self._reading_task.done() or not self._pinged():
                await self._process_op_err(nats.errors.StaleConnectionError())
                return

    def _pinged(self) -> bool:
        """Sends a ping. Only the read loop sees the answer."""
        self._pongs.append(asyncio.get_running_loop().create_future())
        try:
            self._transport.write(_PING)  # type: ignore[union-attr]  # as above
        except (OSError, RuntimeError, AttributeError):  # uvloop raises a RuntimeError if it is closed
            return False
        return True

    # Reading

    async def _read_loop(self) -> None:
        try:
            await self._read()
            failed: Exception = nats.errors.UnexpectedEOF()
        except Exception as exc:  # noqa: BLE001 - any exception here means that nothing reads the connection
            failed = exc
        if self.is_connected:
            await self._error_cb(failed)
        await self._process_op_err(failed)

    async def _read(self) -> None:
        """Reads to the end of the stream."""
        if isinstance(self._transport, NatsTransport):  # as `__init__` made it
            await self._transport.read_all(self._received)

    def _received(self, data: bytes) -> Callable[[], Awaitable[None]] | None:
        """Handles a chunk of bytes. See `incoming.Receive`."""
        self._heard += 1
        began, number, useless = time.perf_counter(), 0, 0
        events = self._reader.feed(data)
        for event in events:
            number += 1
            if not isinstance(event, NatsMessage) or (take := self._direct.get(event.sid)) is None:
                return partial(self._go_on, event, events, _Tally(began, number, useless))
            useless += not self._taken(take, event)
        return partial(self._punish, _Tally(began, number, useless)) if useless else None

    async def _go_on(self, event: Event, events: Iterator[Event], tally: _Tally) -> None:
        """Handles an event that was counted, and those after it in the same chunk."""
        tally.useless += not await self._used(event)
        for each in events:
            tally.number += 1
            tally.useless += not await self._used(each)
        if tally.useless:
            await self._punish(tally)

    async def _punish(self, tally: _Tally) -> None:
        spent = (time.perf_counter() - tally.began) * tally.useless / tally.number
        await asyncio.sleep(min(PENALTY * spent, MAX_PENALTY))

    async def _used(self, event: Event) -> bool:
        """Whether the event was of use."""
        if isinstance(event, NatsMessage):
            take = self._direct.get(event.sid)
            return await self._delivered(event) if take is None else self._taken(take, event)
        if isinstance(event, Oversized):
            self._unusable("too long")
            return False
        await self._controlled(event)
        return True

    def _taken(self, take: Take, message: NatsMessage) -> bool:
        """Whether the message was of use. An exception in any handler ends here."""
        try:
            return take(message.subject.decode("ascii"), message.headers, message.payload)
        except Exception as exc:  # noqa: BLE001 - one peer's message must not end a shared connection
            self._unusable(type(exc).__name__)
            return False

    async def _controlled(self, control: Control) -> None:
        if control.name == b"PING":
            await self._process_ping()
        elif control.name == b"PONG":
            await self._process_pong()
        elif control.name == b"-ERR":
            await self._process_err(control.text.decode("utf-8", "replace"))
        elif control.name == b"INFO":
            await self._process_info(json.loads(control.text))

    async def _delivered(self, message: NatsMessage) -> bool:
        """As `_taken`, for the other subscriptions."""
        try:
            message.subject.decode("ascii")
            await self._process_msg(message.sid, message.subject, message.reply, message.payload, message.headers)
        except Exception as exc:  # noqa: BLE001 - one peer's message must not end a shared connection
            self._unusable(type(exc).__name__)
            return False
        return True

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        """For the other subscriptions. Parses headers here, because the library's parser raises on some.

        If the headers cannot be read, the message arrives without any, so that its receiver does not wait in vain.
        """
        parsed: dict[str, str] | None = None
        try:
            reply.decode("ascii")
            parsed = protocol.fields(headers, status=not reply) if headers else None
        except InvalidMessage as exc:
            self._unusable(type(exc).__name__)
        await super()._process_msg(sid, subject, reply, data, parsed)  # type: ignore[arg-type]  # see `_process_headers`

    async def _process_headers(self, headers: Any) -> dict[str, str] | None:
        """The headers that `_process_msg` parsed."""
        return headers or None

    def _unusable(self, why: str) -> None:
        self.unusable += 1
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + TELL_EVERY
            log.warning("fabric.unusable_message", role=self.options.get("name"), kind=why, number=self.unusable)
