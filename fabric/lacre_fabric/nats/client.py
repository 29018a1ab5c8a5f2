"""nats-py's client with a read loop of ours: no message can end it, and a connection that is silent is a lost one.

Rules:
- What one message raises ends with that message: it is counted, and told once in a while. See `_process_msg`.
- A read loop that ends for any other reason makes a new connection at once.
- `is_connected` means that messages flow: the server is asked once a second whether it is there, and a connection that brought
  nothing for `MAX_SILENT` of these looks is made anew. So is one whose read loop or whose attempts to reconnect have died.
- Who sends what is of no use is read more slowly: of the event loop's time, a flood gets a fifth. The server then ends this
  connection, and no other.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import nats.errors
import structlog
from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport

from lacre.errors import InvalidMessage
from lacre_fabric.nats import protocol
from lacre_fabric.nats.protocol import Control, Event, NatsMessage, Oversized
from lacre_fabric.nats.servers import HungUp, NoTls

CLOSE_TIMEOUT: Final = 1.0  # seconds for a server to take its leave
LOOK: Final = 1.0  # seconds between looks at whether anything came
# Looks without a byte, with a ping at each, until the server counts as gone: less than a caller's patience, more than a
# machine under load takes to answer.
MAX_SILENT: Final = 5
TELL_EVERY: Final = 10.0  # seconds between lines of the log about messages that could not be used
PENALTY: Final = 4.0  # of the time that useless messages took, how many times as long nothing more is read
MAX_PENALTY: Final = 0.5  # seconds at a time; well below what counts as silence
RETRY: Final = 1.0  # seconds until a reconnection that failed in a way that nobody foresaw is tried again
_CHUNK: Final = 32 * 1024  # bytes read at a time: other connections have their turn after twice as many
_PING: Final = b"PING\r\n"

log = structlog.get_logger("lacre.fabric")

# Subject, headers as on the wire, payload; whether the message was of any use. Called on the event loop.
Take = Callable[[str, bytes, bytes], bool]


class NatsTransport(TcpTransport):
    """Ends with a handshake that failed. The library would wait for ever for the end of what the handshake had taken over, and
    for half a minute for the last word in TLS of a server that froze.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # the library has none
        self._aborted = False

    async def connect(self, *arguments: Any, **options: Any) -> None:
        if self._io_writer is not None:  # of a try that came to nothing: the library would leave it to the garbage collector
            self._io_writer.transport.abort()
        self._aborted = False
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

    async def wait_closed(self) -> None:
        if not self._aborted:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await super().wait_closed()  # type: ignore[no-untyped-call]  # as above

    def __bool__(self) -> bool:
        return True  # else the library would replace it, as long as it is not connected


class DirectClient(Client):
    """Hands the messages of some subscriptions over as they are parsed: subject, headers as on the wire, payload.

    The library's own way leads through a dictionary of headers, a queue and a task for each message, which costs a gateway more
    than all that it does with one.

    keep: bytes of the longest message that is of any use; longer ones are dropped as they arrive. look: seconds, as `LOOK`.
    unusable: how many messages could not be used, because they were too long, malformed, or raised where they were handled.
    """

    def __init__(self, keep: int = protocol.MAX_SIZE, *, look: float = LOOK) -> None:
        super().__init__()
        self._look = look
        self._direct: dict[int, Take] = {}
        self._transport = NatsTransport()
        self._reader = protocol.ProtocolReader(keep)
        self._ps = self._reader  # type: ignore[assignment]  # of its parser, the library itself only calls `reset`
        self._heard = 0  # chunks that came
        self._tell_at = 0.0
        self.unusable = 0

    async def subscribe_directly(self, subject: str, take: Take) -> Subscription:
        """take: called on the event loop for each message; see `Take`."""
        subscription = await self.subscribe(subject)
        self._direct[subscription._id] = take
        return subscription

    def _remove_sub(self, sid: int, max_msgs: int = 0) -> None:
        self._direct.pop(sid, None)
        super()._remove_sub(sid, max_msgs)

    # The connection

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        """Comes before anything is said to a server. Where `tls://` is called, the library would take a server's word, which
        is in the clear and may be anybody's, that it speaks none, and go on with the password.
        """
        server = self._current_server
        if initial_connection and server is not None and server.uri.scheme == "tls" and not info.get("tls_required"):
            raise NoTls
        if isinstance(limit := info.get("max_payload"), int):
            self._max_payload = limit  # an account may have a smaller one than the server, which says so after the password
        await super()._process_info(info, initial_connection)

    async def _process_connect_init(self) -> None:
        """The library takes it for a connection, too, when the server hangs up in place of an answer."""
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task):  # of a connection that came to nothing
            if task is not None:
                task.cancel()
        self._reader.reset()
        try:
            await super()._process_connect_init()
        except ConnectionError as exc:
            raise HungUp from exc
        if not self.is_connected:
            raise HungUp

    async def _process_err(self, err_msg: str) -> None:
        """Only a credential that the server does not take ends a connection for good; to the library, each error does."""
        said = err_msg.lower()
        if "authorization violation" in said or "permissions violation" in said:
            await super()._process_err(said)
        else:
            await self._process_op_err(nats.errors.Error(f"nats: {said}"))

    async def _process_pong(self) -> None:
        """The library ends its read loop where the one that waited for the answer has given up."""
        if self._pongs:
            waiting = self._pongs.pop(0)
            if not waiting.done():
                waiting.set_result(True)

    async def _attempt_reconnect(self) -> None:
        """Until it is connected, or closed: an exception that the library does not foresee would leave it between the two."""
        while True:
            try:
                await super()._attempt_reconnect()
            except Exception as exc:  # noqa: BLE001 - it is told, and tried again
                if self.is_closed:
                    return
                log.error("fabric.reconnecting_failed", kind=type(exc).__name__)
                self._status = Client.RECONNECTING
                await asyncio.sleep(RETRY)
            else:
                return

    async def _ping_interval(self) -> None:
        """Looks whether anything came. A look that is late counts once: then it was this process that stood still."""
        silent, heard = 0, self._heard
        while True:
            await asyncio.sleep(self._look)
            if not self.is_connected:
                return  # the next connection has its own
            if self._heard != heard:
                silent, heard = 0, self._heard
                continue
            silent += 1
            if silent > MAX_SILENT or self._reading_task is None or self._reading_task.done() or not self._pinged():
                await self._process_op_err(nats.errors.StaleConnectionError())
                return

    def _pinged(self) -> bool:
        """Whether the server could be asked; its answer is nobody's but the read loop's."""
        self._pongs.append(asyncio.get_running_loop().create_future())
        try:
            self._transport.write(_PING)  # type: ignore[union-attr]  # as above
        except (OSError, RuntimeError, AttributeError):  # uvloop has a RuntimeError for what is closed
            return False
        return True

    # Reading

    async def _read_loop(self) -> None:
        try:
            await self._read()
            failed: Exception = nats.errors.UnexpectedEOF()
        except Exception as exc:  # noqa: BLE001 - whatever ended it, a connection that nobody reads is none
            failed = exc
        if self.is_connected:
            await self._error_cb(failed)
        await self._process_op_err(failed)

    async def _read(self) -> None:
        """Until the end of the stream."""
        transport = self._transport
        while transport is not None and (data := await transport.read(_CHUNK)):
            self._heard += 1
            began, useless, number = time.perf_counter(), 0, 0
            for event in self._reader.feed(data):
                number += 1
                useless += not await self._used(event)
            if useless:
                spent = (time.perf_counter() - began) * useless / number
                await asyncio.sleep(min(PENALTY * spent, MAX_PENALTY))

    async def _used(self, event: Event) -> bool:
        """Whether the event was of any use."""
        if isinstance(event, NatsMessage):
            return await self._delivered(event)
        if isinstance(event, Oversized):
            self._unusable("too long")
            return False
        await self._controlled(event)
        return True

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
        """Whether the message was of any use. What it raises, wherever it is handled, ends here."""
        try:
            take = self._direct.get(message.sid)
            subject = message.subject.decode("ascii")
            if take is not None:
                return take(subject, message.headers, message.payload)
            await self._process_msg(message.sid, message.subject, message.reply, message.payload, message.headers)
        except Exception as exc:  # noqa: BLE001 - a peer's message must not end the connection of all
            self._unusable(type(exc).__name__)
            return False
        return True

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        """For the subscriptions that are not direct ones. Headers are parsed here, for the library's parser raises at some.

        A message whose headers cannot be read comes without any, so that whoever waits for it does not wait for nothing.
        """
        parsed: dict[str, str] | None = None
        try:
            reply.decode("ascii")
            parsed = protocol.fields(headers, status=not reply) if headers else None
        except InvalidMessage as exc:
            self._unusable(type(exc).__name__)
        await super()._process_msg(sid, subject, reply, data, parsed)  # type: ignore[arg-type]  # see `_process_headers`

    async def _process_headers(self, headers: Any) -> dict[str, str] | None:
        """What `_process_msg` made of them."""
        return headers or None

    def _unusable(self, why: str) -> None:
        self.unusable += 1
        now = time.monotonic()
        if now >= self._tell_at:
            self._tell_at = now + TELL_EVERY
            log.warning("fabric.unusable_message", role=self.options.get("name"), kind=why, number=self.unusable)
