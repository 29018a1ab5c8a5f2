"""One HTTP request and its answer, over bare ASGI: all the HTTP that the relay needs, without the request's meaning.

Rules:
- A body is counted while it is read, even if it has a Content-Length, and has a limited time to arrive. If its sender or
  purpose is refused, nothing of it is kept.
- Nothing of an answer is buffered: `write` returns when the server has taken the bytes, and a client that reads nothing is cut.
- Only the seal's final chunk shows that an answer is whole. A broken answer never has it, however it ends here.
- `give_up` ends an answer properly, which says that its worker may be lost. Without an end, the server aborts the connection as
  if this process had died, which says the opposite (RFC 9112 section 7.1: no last chunk comes).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Protocol

from starlette.types import Receive, Scope, Send

from lacre import problems
from lacre.evidence import audit_proof
from lacre.evidence.audit_proof import AuditProof
from lacre.runtime import tasks
from lacre.wire.header import MANIFEST_VERSION, MAX_SEALED_REQUEST, MEDIA_TYPE_RESPONSE
from lacre_gateway.audit.log import AuditUnavailable, Recorded
from lacre_gateway.http.headers import Fields, address_of
from lacre_gateway.http.refusal import RawHeaders, Refusal

REFUSED: Final = "refused"  # in the scope's state: the refusal that was sent
CUT: Final = "cut"  # in the scope's state: the answer ended properly, but is not whole
KNOWN: Final = "known"  # in the scope's state, if the caller has a valid token
FACTS: Final = "facts"  # in the scope's state: further fields for the log, such as the pool of a request
# A worker gives up a stream whose credit is not renewed for 5 s (DESIGN section 7); later there is nothing left to send.
STALL_LIMIT: Final = 10.0
# After a refusal, the rest of a body is read and dropped for this long. Closing at once would reset the connection, and the
# client might lose the refusal before reading it.
LINGER: Final = 2.0
# This much has usually arrived when a refusal is decided. Reading it first lets the client use the connection again.
_SKIM_BYTES: Final = 64 * 1024
_SKIM_TIME: Final = 0.05

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


class ClientGone(Exception):
    """The client closed the connection."""


class AnswerAborted(Exception):
    """Aborts a running answer. It reaches the server, which closes the connection."""


class Stalled(Exception):
    """The client has stopped reading."""


class Exchange:
    """One request and its answer. address: the caller's. status: of the answer; None so far. recorded: its intent, once there
    is one.

    since, first_byte: when it began, and when its answer did, on the monotonic clock. received, sent: bytes. records: pieces.
    limits: header fields about the caller's limits. manifest: the version, which a known caller is told. stall_limit: seconds
    that a client may leave a piece unread.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, stall_limit: float = STALL_LIMIT) -> None:
        self._receive = receive
        self._send = send
        self._stall_limit = stall_limit
        self._unread, self._asked = True, False
        self._over = False  # its end was sent, or begun
        self._state = scope["state"]
        self.fields = Fields.collect(scope["headers"])
        self.address = address_of(scope)
        self.request_id: str = self._state["request_id"]
        self.status: int | None = None
        self._body = bytearray()
        self._body_until = 0.0  # on the loop's clock
        self.recorded: asyncio.Future[Recorded] | None = None
        self.limits: RawHeaders = []
        self.manifest: int | None = None
        self.since = time.monotonic()
        self.first_byte: float | None = None
        self.received = self.sent = self.records = 0

    @property
    def traceparent(self) -> str | None:
        return self.fields.traceparent()

    def known(self) -> None:
        """The caller has a valid token."""
        self._state[KNOWN] = True

    def routed(self, pool: str, model: str, action: str) -> None:
        """The request is for a pool and a model of the manifest."""
        self._state[FACTS] = {"pool": pool, "model": model, "action": action}

    @property
    def started(self) -> bool:
        """Whether the answer has begun, so that it is too late for a problem document."""
        return self.status is not None

    async def sealed_start(self, room: BodyCount, seconds: float, size: int) -> bytes:
        """The first `size` bytes of the body, or all of a shorter one. The rest stays unread.

        seconds: for this and the rest together. Raises Refusal (too large, too slow), LimitExceeded, or ClientGone.
        """
        self._body_until = asyncio.get_running_loop().time() + seconds
        await self._read(room, size)
        return bytes(self._body[:size])

    async def sealed_body(self, room: BodyCount) -> bytes:
        """The whole body, after its start was read. It is no longer kept here. Raises as `sealed_start`."""
        await self._read(room, MAX_SEALED_REQUEST + 1)
        body, self._body = bytes(self._body), bytearray()
        return body

    async def _read(self, room: BodyCount, size: int) -> None:
        """Reads until there are `size` bytes, or all."""
        try:
            async with asyncio.timeout_at(self._body_until):
                while self._unread and len(self._body) < size:
                    piece = await self._next_piece()
                    if len(self._body) + len(piece) > MAX_SEALED_REQUEST:
                        raise Refusal(problems.TOO_LARGE)
                    room.take(len(piece))
                    self._body += piece
                    self.received = len(self._body)
        except TimeoutError:
            raise Refusal(problems.SLOW_BODY) from None

    async def gone(self) -> None:
        """Returns when the client has left. Only after the body was read."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def begin(self, proof: AuditProof) -> None:
        """Starts the answer. It has no Content-Length: only the seal shows its end. proof: that it was recorded."""
        self.status = 200
        self.first_byte = time.monotonic()
        headers = [*_ANSWER_HEADERS, *self._told(), _audit(proof)]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    async def write(self, pieces: Sequence[bytes]) -> None:
        """Raises Stalled if the client does not take them in time."""
        await self._send_body(pieces, more=True)

    async def end(self, pieces: Sequence[bytes] = ()) -> None:
        """Sends the last pieces and ends the answer. Raises Stalled."""
        self._over = True
        await self._send_body(pieces, more=False)

    async def give_up(self) -> None:
        """Ends an answer that is not whole, and whose worker may be lost. Raises Stalled."""
        self._state[CUT] = True
        if not self._over:
            await self.end()

    async def _send_body(self, pieces: Sequence[bytes], *, more: bool) -> None:
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        try:
            async with asyncio.timeout(self._stall_limit):
                await self._send({"type": "http.response.body", "body": body, "more_body": more})
        except TimeoutError:
            raise Stalled from None
        self.sent += len(body)
        self.records += len(pieces)

    async def refuse(self, refusal: Refusal) -> None:
        """Answers with a problem document."""
        self.status, self._state[REFUSED] = refusal.problem.status, refusal
        self._body = bytearray()
        # the client waits for permission, and is not told to send an unwanted body
        waits = self.fields.expects() and not self._asked
        if not waits:
            await self._drop(_SKIM_TIME, _SKIM_BYTES)
        answer, document = refusal.answer(self.request_id)
        headers = [*answer, *self._told()]
        with contextlib.suppress(AuditUnavailable):
            if self.recorded is not None:
                headers.append(_audit((await asyncio.shield(self.recorded)).proof()))
        if self._unread:
            headers.append((b"connection", b"close"))
        await self._send({"type": "http.response.start", "status": self.status, "headers": headers})
        linger = self._unread and not waits
        await self._send({"type": "http.response.body", "body": document, "more_body": linger})
        if linger:
            await self._drop(LINGER, MAX_SEALED_REQUEST)
            await self.end()

    def _told(self) -> RawHeaders:
        version = [] if self.manifest is None else [(MANIFEST_VERSION.encode(), b"%d" % self.manifest)]
        return [*self.limits, *version]

    async def _drop(self, seconds: float, limit: int) -> None:
        """Reads and drops the rest of the body, within limits."""
        with contextlib.suppress(TimeoutError, ClientGone):
            async with asyncio.timeout(seconds):
                while self._unread and limit > 0:
                    limit -= len(await self._next_piece())

    async def _next_piece(self) -> bytes:
        self._asked = True
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._unread = False
            raise ClientGone
        self._unread = message.get("more_body", False)
        piece: bytes = message.get("body", b"")
        return piece


class Attended:
    """A context that ClientGone ends as soon as the client leaves. Only after the body was read."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._left = self._over = False

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        self._gone = tasks.detach("client's departure", self._exchange.gone())
        self._gone.add_done_callback(self._leave)

    async def __aexit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        self._over = True
        self._gone.cancel()
        # If another task cancelled it as well, it stays cancelled.
        if self._left and self._task is not None and self._task.uncancel() == 0 and kind is asyncio.CancelledError:
            raise ClientGone from None

    def _leave(self, gone: asyncio.Task[object]) -> None:
        if self._task is not None and not self._over and not gone.cancelled():
            self._left = True
            self._task.cancel()


def _audit(proof: AuditProof) -> tuple[bytes, bytes]:
    return audit_proof.HEADER.encode(), proof.header().encode()
