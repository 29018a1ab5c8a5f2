"""One sealed request and its answer, straight on the connection: all the HTTP that the relay needs, without its meaning.

Rules:
- A body is counted while it is read, even if it has a Content-Length, and has a limited time to arrive. If its sender or
  purpose is refused, nothing of it is kept.
- Nothing of an answer is buffered: `write` passes it to the transport, and waits first if the client has not taken the bytes
  before. A refusal waits too: its client may have no token. A client that reads nothing is cut.
- Only the seal's final chunk shows that an answer is whole. A broken answer never has it, however it ends here.
- `give_up` ends an answer properly, which says that its worker may be lost. `abort` closes the connection as if this process
  had died, which says the opposite (RFC 9112 section 7.1: no last chunk comes).
- No timer and no task of its own: the connection reports what arrives and when the client leaves, and the clock asks `late`.
- No exception is kept here: its traceback holds the frames of the request, and so its body (see `tests/gateway/test_soak.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Final, Protocol

from lacre import problems
from lacre.evidence import audit_proof
from lacre.evidence.audit_proof import AuditProof
from lacre.runtime.http1 import RequestHead
from lacre.wire.header import MANIFEST_VERSION, MAX_SEALED_REQUEST, MEDIA_TYPE_RESPONSE
from lacre_gateway.audit.log import AuditUnavailable, Recorded
from lacre_gateway.http.answer_writer import CONTINUE, HttpAnswer
from lacre_gateway.http.headers import Fields
from lacre_gateway.http.refusal import NO_FACTS, RawHeaders, Refusal

# A worker gives up a stream whose credit is not renewed for 5 s (DESIGN section 7); later there is nothing left to send.
STALL_LIMIT: Final = 10.0
# After a refusal, the rest of a body is read and dropped for this long. Closing at once would reset the connection, and the
# client might lose the refusal before reading it.
LINGER: Final = 2.0
# This much has usually arrived when a refusal is decided. Reading it first lets the client use the connection again.
_SKIM_BYTES: Final = 64 * 1024
_SKIM_TIME: Final = 0.05

_REQUEST_ID: Final = b"lacre-request-id"
_ANSWER_HEADERS: Final = (
    (b"content-type", MEDIA_TYPE_RESPONSE.encode()),
    (b"incremental", b"?1"),  # draft-ietf-httpbis-incremental: intermediaries must not buffer
    (b"x-accel-buffering", b"no"),  # the same, for nginx
    (b"cache-control", b"no-store"),
)


class BodyCount(Protocol):
    """Counts the bytes of one body, before each is kept: `lacre_gateway.budget.in_flight.BodyReservation`."""

    def take(self, size: int) -> None:
        """Raises to refuse this many more bytes."""
        ...


class CallersConnection(Protocol):
    """What an exchange needs of its connection: `lacre_gateway.http.connection.GatewayConnection`.

    default_fields: of each answer, such as its date. write_paused: whether the client has yet to take earlier bytes.
    draining: whether the listener is about to close.
    """

    @property
    def default_fields(self) -> RawHeaders: ...
    @property
    def write_paused(self) -> bool: ...
    @property
    def draining(self) -> bool: ...
    def write(self, data: bytes) -> None: ...
    def asked(self) -> None:
        """The body's bytes now count as the server's own."""

    def read_on(self) -> None:
        """There is room for more of the body."""

    def answered(self, *, keep_alive: bool) -> None:
        """The answer was written, with its end. keep_alive: whether another request may follow."""

    def break_off(self, *, reset: bool) -> None:
        """Closes after the bytes sent so far, or at once."""


class ClientGone(Exception):
    """The client closed the connection."""


class Stalled(Exception):
    """The client has stopped reading."""


class Exchange:
    """One request and its answer. address: the caller's. status: of the answer; None so far. recorded: its intent, once there
    is one.

    since, first_byte: when it began, and when its answer did, on the monotonic clock. received, sent: bytes. records: pieces.
    limits: header fields about the caller's limits. for_page: those that let a browser's page read the answer. manifest: the
    version, which a known caller is told. stall_limit: seconds that a client may leave a piece unread. task: runs it, from its
    begin to its end. response_complete: whether all of the answer was written.

    For the log: refused: of the refusal that was sent. is_known: whether the caller has a valid token. facts: pool, model and
    action, once the manifest has them. cut: whether its answer ended in order without being whole.
    """

    # Thousands may run for minutes: a dictionary of so many attributes takes 2 KB.
    __slots__ = (
        "__weakref__", "_aborted", "_answer", "_body_until", "_connection", "_cut_short", "_ends_at", "_expects", "_kept",
        "_news", "_one_zero", "_over", "_stall_limit", "_too_late", "_wait_until", "address", "asked", "body", "cut", "facts",
        "fields", "first_byte", "for_page", "gone", "is_known", "limits", "manifest", "more_body", "received", "recorded",
        "records", "refused", "request_id", "response_complete", "sent", "since", "status", "task",
    )  # fmt: skip

    def __init__(
        self, connection: CallersConnection, head: RequestHead, address: str, request_id: str,
        *, stall_limit: float = STALL_LIMIT,
    ) -> None:  # fmt: skip
        self._connection = connection
        self._answer = HttpAnswer(head.version, keep_alive=head.keep_alive)
        self._one_zero = head.version == "1.0"
        self._expects = head.expects
        self._stall_limit = stall_limit
        self._over = self._aborted = False  # over: its end was sent, or begun
        self.response_complete = False
        self.task: asyncio.Task[None] | None = None
        self.fields = Fields.collect(head.fields)
        self.address = address
        self.request_id = request_id
        self.status: int | None = None
        self.recorded: asyncio.Future[Recorded] | None = None
        self.limits: RawHeaders = []
        self.for_page: RawHeaders = []
        self.manifest: int | None = None
        self.since = time.monotonic()
        self.first_byte: float | None = None
        self.received = self.sent = self.records = 0
        self.refused: Mapping[str, str] = NO_FACTS
        self.is_known = self.cut = False
        self.facts: Mapping[str, str] = NO_FACTS
        # what the connection says
        self.body = bytearray()  # arrived, and not read yet
        self.more_body = True
        self.asked = self.gone = False
        self._news: asyncio.Future[bool] | None = None  # True: something has changed; False: it took too long
        # limits, on the monotonic clock
        self._kept = bytearray()  # of the body: read and counted
        self._body_until = self._wait_until = self._ends_at = math.inf
        self._too_late: Callable[[], Exception] | None = None  # what `_ends_at` means; None: nobody attends
        self._cut_short: Callable[[], Exception] | None = None  # why its task was cancelled from here

    @property
    def traceparent(self) -> str | None:
        return self.fields.traceparent()

    def decided(self) -> None:
        """Everything of its head has been used: an answer of minutes need not keep the token."""
        self.fields = self.fields.for_trace()

    def known(self) -> None:
        """The caller has a valid token."""
        self.is_known = True

    def routed(self, pool: str, model: str, action: str) -> None:
        """The request is for a pool and a model of the manifest."""
        self.facts = {"pool": pool, "model": model, "action": action}

    @property
    def started(self) -> bool:
        """Whether the answer has begun, so that it is too late for a problem document."""
        return self.status is not None

    @property
    def unanswered(self) -> bool:
        """Whether nothing was sent to a client that may still be there."""
        return not (self._answer.begun or self._aborted or self.gone)

    @property
    def whole(self) -> bool:
        """Whether an answer was sent with all that belongs to it."""
        return self.response_complete and not self.cut

    # What the connection and the clock report (see `lacre.runtime.listening.Cycle`)

    @property
    def keep_alive(self) -> bool:
        """Whether the connection lives on after the answer; the server sets it to False when it drains."""
        return self._answer.keep_alive

    @keep_alive.setter
    def keep_alive(self, value: bool) -> None:
        self._answer.keep_alive = value

    def take(self, content: bytes) -> None:
        self.body += content
        self._tell()

    def finish(self) -> None:
        self.more_body = False
        self._tell()

    def writable(self) -> None:
        """The client has taken most of the bytes sent."""
        self._tell()

    def lost(self) -> None:
        """The client has left."""
        self.gone, self.more_body = True, self._unread  # what was not read by now never will be
        self.body = bytearray()
        self._tell()
        self._end_by(ClientGone)

    def late(self, now: float) -> None:
        """Ends what has lasted too long: a wait for the client, or the whole request."""
        if now >= self._wait_until:
            self._tell(in_time=False)
        if now >= self._ends_at and self._too_late is not None:
            self._end_by(self._too_late)

    def _tell(self, *, in_time: bool = True) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(in_time)

    def _end_by(self, why: Callable[[], Exception]) -> None:
        """Cancels the work for this request, while it is attended (see `Attended`)."""
        if self._too_late is not None and self._cut_short is None and self.task is not None:
            self._cut_short = why
            self.task.cancel()

    async def _wait(self, until: float) -> bool:
        """Waits until something changes; False if it took until `until`. Raises ClientGone."""
        self._news, self._wait_until = asyncio.get_running_loop().create_future(), until
        try:
            in_time = await self._news
        finally:
            self._news, self._wait_until = None, math.inf
        if self.gone:
            raise ClientGone
        return in_time

    def attend(self, until: float, too_late: Callable[[], Exception]) -> None:
        """See `Attended`. Raises ClientGone."""
        if self.gone:
            raise ClientGone
        self._ends_at, self._too_late = until, too_late

    def left_alone(self) -> Callable[[], Exception] | None:
        """The end of `attend`. Returns the reason if its task was cancelled from here alone."""
        why, self._cut_short, self._too_late, self._ends_at = self._cut_short, None, None, math.inf
        if why is None or self.task is None or self.task.uncancel():
            return None
        return why

    # The body

    async def sealed_start(self, room: BodyCount, seconds: float, size: int) -> bytes:
        """The first `size` bytes of the body, or all of a shorter one. The rest stays unread.

        seconds: for this and the rest together. Raises Refusal (too large, too slow), LimitExceeded, or ClientGone.
        """
        self._body_until = time.monotonic() + seconds
        await self._read(room, size)
        return bytes(self._kept[:size])

    async def sealed_body(self, room: BodyCount) -> bytes:
        """The whole body, after its start was read. It is no longer kept here. Raises as `sealed_start`."""
        await self._read(room, MAX_SEALED_REQUEST + 1)
        body, self._kept = bytes(self._kept), bytearray()
        return body

    async def _read(self, room: BodyCount, size: int) -> None:
        """Reads until there are `size` bytes, or all."""
        while self._unread and len(self._kept) < size:
            piece = await self._next_piece(self._body_until)
            if piece is None:
                raise Refusal(problems.SLOW_BODY)
            if len(self._kept) + len(piece) > MAX_SEALED_REQUEST:
                raise Refusal(problems.TOO_LARGE)
            room.take(len(piece))
            self._kept += piece
            self.received = len(self._kept)

    @property
    def _unread(self) -> bool:
        return self.more_body or bool(self.body)

    async def _next_piece(self, until: float) -> bytearray | None:
        """What has arrived of the body; None if nothing did until `until`. Raises ClientGone."""
        if not self.asked:
            self.asked = True
            self._connection.asked()
            if self._expects and not self.gone:
                self._connection.write(CONTINUE)
        while not self.body and self.more_body and not self.gone:
            self._connection.read_on()
            if time.monotonic() >= until or not await self._wait(until):  # a trickle may never be found waiting by the clock
                return None
        if self.gone:
            raise ClientGone
        piece, self.body = self.body, bytearray()
        return piece

    # The answer

    async def begin(self, proof: AuditProof) -> None:
        """Starts the answer. It has no Content-Length: only the seal shows its end. proof: that it was recorded.

        Raises Stalled.
        """
        self.status = 200  # from here on a failure breaks an answer, for which its worker has worked
        if self._connection.write_paused:
            await self._writable()
        self.first_byte = time.monotonic()
        self._send_head(200, *_ANSWER_HEADERS, *self._told(), _audit(proof))
        self.limits = []  # the answer may take minutes

    async def write(self, pieces: Sequence[bytes]) -> None:
        """Raises Stalled if the client does not take the bytes before in time."""
        if self._connection.write_paused:
            await self._writable()
        self._send(self._answer.chunk(pieces))
        self._count(pieces)

    async def end(self, pieces: Sequence[bytes] = ()) -> None:
        """Sends the last pieces and ends the answer. Raises Stalled."""
        self._over = True
        if self._connection.write_paused:
            await self._writable()
        self._finish(pieces)
        self._count(pieces)

    async def give_up(self) -> None:
        """Ends an answer that is not whole, and whose worker may be lost. Raises Stalled.

        If its head still waits for the client, nothing can be ended in order.
        """
        self.cut = True
        if not self._answer.begun:
            self.abort()
        elif not self._over:
            await self.end()

    def abort(self) -> None:
        """Closes the connection without an end of the answer. HTTP/1.0 clients take a close in order for an end."""
        if not self._aborted and not self.gone:
            self._connection.break_off(reset=self._one_zero)
        self._over = self._aborted = True

    def close(self) -> None:
        """The end of its work: an answer that has no end by now gets none. Its connection may keep it, but no token in it."""
        if not self.response_complete:
            self.abort()
        self._kept, self.body, self.task = bytearray(), bytearray(), None
        self.recorded = None
        self.decided()

    def _finish(self, pieces: Sequence[bytes] = ()) -> None:
        last = self._answer.end(pieces)
        self._over = self.response_complete = True
        self._send(last)
        if not self.gone:
            self._connection.answered(keep_alive=self._answer.keep_alive)

    def _send(self, data: bytes) -> None:
        if data and not self.gone:
            self._connection.write(data)

    def _count(self, pieces: Sequence[bytes]) -> None:
        self.sent += sum(map(len, pieces))
        self.records += len(pieces)

    async def _writable(self) -> None:
        """Waits until the client has taken most of the bytes sent. Raises Stalled."""
        until = time.monotonic() + self._stall_limit
        while self._connection.write_paused and not self.gone:
            with contextlib.suppress(ClientGone):
                if not await self._wait(until):
                    raise Stalled

    async def refuse(self, refusal: Refusal) -> None:
        """Answers with a problem document, once the client has taken the bytes before. One that does not is cut."""
        self.status, self.refused = refusal.problem.status, refusal.said()
        self._kept = bytearray()
        # the client waits for permission, and is not told to send an unwanted body
        waits = self._expects and not self.asked
        if not waits:
            await self._drop(_SKIM_TIME, _SKIM_BYTES)
        fields, document = refusal.answer(self.request_id)
        fields += self._told()
        with contextlib.suppress(AuditUnavailable):
            if self.recorded is not None:
                fields.append(_audit((await asyncio.shield(self.recorded)).proof()))
        if self._unread:
            fields.append((b"connection", b"close"))
        try:
            await self._writable()
        except Stalled:
            self.abort()
            return
        self._send_head(self.status, *fields)
        self._send(self._answer.chunk([document]))
        if self._unread and not waits:
            await self._drop(LINGER, MAX_SEALED_REQUEST)
        self._finish()

    def refuse_at_once(self, refusal: Refusal) -> None:
        """Answers with a problem document, and closes: nothing more of the request is read, and nothing is waited for."""
        self.status, self.refused = refusal.problem.status, refusal.said()
        self._kept = bytearray()
        fields, document = refusal.answer(self.request_id)
        self._answer.keep_alive = False
        self._send_head(self.status, *fields)
        self._finish([document])

    def _send_head(self, status: int, *fields: tuple[bytes, bytes]) -> None:
        if self._connection.draining:  # otherwise the client may send its next request into a connection that ends
            self._answer.keep_alive = False
        named = (_REQUEST_ID, self.request_id.encode())
        self._send(self._answer.head(status, [*self._connection.default_fields, *fields, *self.for_page, named]))

    def _told(self) -> RawHeaders:
        version = [] if self.manifest is None else [(MANIFEST_VERSION.encode(), b"%d" % self.manifest)]
        return [*self.limits, *version]

    async def _drop(self, seconds: float, limit: int) -> None:
        """Reads and drops the rest of the body, within limits. With a timer of its own: the clock is too coarse for it."""
        with contextlib.suppress(TimeoutError, ClientGone):
            async with asyncio.timeout(seconds):
                while self._unread and limit > 0:
                    limit -= len(await self._next_piece(math.inf) or b"")


class Attended:
    """A context that the client's departure ends at once (ClientGone), and the clock after `longest` seconds of the request.

    too_late: makes the exception of the latter. Only after the body was read.
    """

    def __init__(self, exchange: Exchange, longest: float, too_late: Callable[[], Exception]) -> None:
        self._exchange = exchange
        self._until = exchange.since + longest
        self._too_late = too_late

    def __enter__(self) -> None:
        self._exchange.attend(self._until, self._too_late)

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        why = self._exchange.left_alone()
        if why is not None and kind is asyncio.CancelledError:
            raise why() from None


def _audit(proof: AuditProof) -> tuple[bytes, bytes]:
    return audit_proof.HEADER.encode(), proof.header().encode()
