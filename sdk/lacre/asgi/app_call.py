"""Opens a sealed request and calls an ASGI app. Seals the app's answer piece by piece as the app produces it.

Rules:
- The app sees an ordinary HTTP request, with the grant's limits in `scope["extensions"]["lacre.call"]`. It does not know
  shapes: `lacre.wire.records` decides how its pieces become records.
- Every event that the app sends leaves at once as a sealed record. (Under `pad`, a body that is not an event stream waits for a
  full record.)
- The final chunk is sealed only after the app finished its response. If the app raises or stops early, the stream has no final
  chunk and the client gets `TruncatedStream`: a broken answer never passes for a whole one.
- Closing the generator sends the app `http.disconnect` and cancels it. From then on `send` raises, as ASGI 2.4 requires. The
  app can delay the closing by `tasks.END_LIMIT` at most.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from lacre.errors import AppFailed, UsageError
from lacre.runtime import tasks
from lacre.wire import bhttp
from lacre.wire.framing import MAX_CHUNK
from lacre.wire.header import SealedHeader
from lacre.wire.opening import PrivateKey, ResponseSealer, open_request
from lacre.wire.padding import Shape
from lacre.wire.records import Headers, Records, records

SCHEME: Final = "https"
EXTENSION: Final = "lacre.call"
MAX_PENDING: Final = 16  # pieces that the app may be ahead of the sealing: enough to overlap, too few to hide a slow reader

_RESPONSE: Final = ("http.response.start", "http.response.body")
_OF_A_CONNECTION: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Disconnected(OSError):
    """What `send` raises to an app whose caller has gone (ASGI specification 2.4)."""


@dataclass(slots=True)
class Usage:
    """Tokens that a call used so far. The app writes it; the node reads it for receipts.

    reasoning_tokens: those of the completion in which the model reasons. first_output: when the first token was made, on the
    monotonic clock; None: none yet, or the app cannot tell.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    model_digest: str = ""
    reasoning_tokens: int = 0
    first_output: float | None = None


def _weightless(_sequences: int) -> None:
    """For a call that no worker counts."""


@dataclass(frozen=True, slots=True)
class Call:
    """What the grant says of this call; None if it says nothing. max_tokens counts output over all choices.

    fair: pseudonyms of the tenant and of the caller that change hourly. They only decide whose turn it is. weigh: tells the
    worker how many of the call's sequences are at its engine, so that it pulls accordingly. Callable from any thread.
    """

    request_id: str
    model: str | None = None
    action: str | None = None
    max_tokens: int | None = None
    max_prompt_tokens: int | None = None
    features: frozenset[str] = frozenset()
    fair: tuple[str, str] | None = None
    usage: Usage = field(default_factory=Usage)
    weigh: Callable[[int], object] = field(default=_weightless, repr=False)


@dataclass(frozen=True, slots=True)
class Opened:
    """A sealed request after opening. `sealer` is one-use: it seals the one answer."""

    request: bhttp.Request = field(repr=False)
    header: SealedHeader
    sealer: ResponseSealer = field(repr=False)

    def headers(self, name: str) -> list[str]:
        """Every value of an inner header; `name` in lower case."""
        return [value for key, value in self.request.headers if key == name]


def decoded_path(request: bhttp.Request) -> str:
    """The path as an app sees it: without its query, and with its escapes decoded."""
    return unquote_to_bytes(request.path.partition("?")[0]).decode("utf-8", "replace")


def open_sealed(body: bytes, keys: Mapping[int, PrivateKey]) -> Opened:
    """Opens a whole sealed request. Raises ProtocolError or VerificationError kinds; then nothing of it was acted on."""
    plaintext, header, sealer = open_request(keys, body)
    return Opened(bhttp.decode_request(plaintext), header, sealer)


def refuse(
    opened: Opened,
    status: int,
    body: Mapping[str, Any],
    media_type: str = "application/json",
    headers: Headers = (),
    *,
    shape: Shape = "pad",
    trailers: Headers = (),
) -> bytes:
    """A whole sealed answer that carries `body` as JSON, in place of the app's."""
    content = json.dumps(body, separators=(",", ":")).encode()
    plain = records(shape)
    head = plain.head(status, (("content-type", media_type), ("content-length", str(len(content))), *headers))
    return opened.sealer.finish(head + b"".join(plain.end(content, trailers)))


async def answer(
    app: App,
    opened: Opened,
    call: Call,
    *,
    shape: Shape = "pad",
    trailers: Callable[[], Headers] = lambda: (),
) -> AsyncGenerator[bytes, None]:
    """Yields the sealed answer of `app`, record by record. It calls `trailers` once, after the app has finished.

    shape: what the grant says. Raises AppFailed, after which the stream has no final chunk.
    """
    plain = records(shape)
    last = b""
    async with aclosing(_Exchange(app, opened.request, call).messages()) as messages:
        async for message in messages:
            if message["type"] == "http.response.start":
                record = _head(plain, message)
            else:
                record, last = _data(plain, message)
            for chunk in _chunks(record):
                yield opened.sealer.seal(chunk)
    *chunks, final = (chunk for record in plain.end(last, trailers()) for chunk in _chunks(record))
    for chunk in chunks:
        yield opened.sealer.seal(chunk)
    yield opened.sealer.finish(final)


class _Exchange:
    """One call of an ASGI app: the app runs in its own task, at most a few messages ahead."""

    def __init__(self, app: App, request: bhttp.Request, call: Call) -> None:
        self._app = app
        self._request = request
        self._call = call
        self._pending: deque[Message] = deque()
        self._came = asyncio.Event()  # a message, or the app's end
        self._room = asyncio.Event()
        self._body_taken = False
        self._gone = asyncio.Event()

    async def messages(self) -> AsyncGenerator[Message, None]:
        """The messages of a whole response: a start, then bodies to the last one. Raises AppFailed if the response is not
        whole.
        """
        task = tasks.spawn("sealed app", self._run())
        task.add_done_callback(lambda _: self._came.set())
        try:
            expected, complete = "http.response.start", False
            while (message := await self._next(task)) is not None:
                if message["type"] not in _RESPONSE:
                    continue  # from an extension that was not offered
                if complete or message["type"] != expected:
                    raise AppFailed("the app's response must be one start, followed by bodies to the last one")
                expected, complete = "http.response.body", _is_last(message)
                yield message
            await task  # raises the app's own error
            if not complete:
                raise AppFailed("the app returned before its response was complete")
        finally:
            self._gone.set()
            self._room.set()
            await tasks.end(task, expected=(Disconnected,))

    async def _next(self, task: asyncio.Task[None]) -> Message | None:
        """The app's next message; None when the app has ended. The end takes no place in the queue, so it is never delayed."""
        while not self._pending:
            if task.done():
                return None
            self._came.clear()
            await self._came.wait()
        message = self._pending.popleft()
        self._room.set()
        return message

    async def _run(self) -> None:
        try:
            await self._app(self._scope(), self._receive, self._send)
        except Exception as exc:  # the boundary to a foreign app: only one type leaves here
            if self._gone.is_set():
                raise  # no task awaits it any longer, so it is logged
            raise AppFailed("the app raised") from exc

    async def _send(self, message: Message) -> None:
        while len(self._pending) >= MAX_PENDING and not self._gone.is_set():
            self._room.clear()
            await self._room.wait()
        if self._gone.is_set():
            raise Disconnected("the caller has gone")
        self._pending.append(message)
        self._came.set()

    async def _receive(self) -> Message:
        if not self._body_taken:
            self._body_taken = True
            return {"type": "http.request", "body": self._request.content, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    def _scope(self) -> Scope:
        raw_path, _, query = self._request.path.partition("?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.5"},
            "http_version": "1.1",
            "method": self._request.method,
            "scheme": self._request.scheme,
            "path": decoded_path(self._request),
            "raw_path": raw_path.encode("ascii"),
            "query_string": query.encode("ascii"),
            "root_path": "",
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._request.headers],
            "client": None,  # the caller is unknown here, and must be
            "server": (self._request.authority, None),
            "extensions": {EXTENSION: self._call},
        }


def _chunks(record: bytes) -> Iterator[bytes]:
    """One sealed record each: the fabric's frames are no larger, however much an app sends at once."""
    for start in range(0, len(record), MAX_CHUNK):
        yield record[start : start + MAX_CHUNK]


def _is_last(message: Message) -> bool:
    return message["type"] == "http.response.body" and not message.get("more_body", False)


def _data(plain: Records, message: Message) -> tuple[bytes, bytes]:
    """What to seal now; and the last piece of the body, which goes out together with the end."""
    body = bytes(message.get("body", b""))
    return (b"", body) if _is_last(message) else (plain.data(body), b"")


def _head(plain: Records, message: Message) -> bytes:
    try:
        return plain.head(message["status"], _decoded(message.get("headers", ())))
    except UsageError as exc:
        raise AppFailed("the app answered with a status or a header that HTTP does not allow") from exc


def _decoded(headers: Sequence[tuple[bytes, bytes]]) -> Headers:
    """ASGI header bytes for BHTTP, in lower case, without the fields of a connection (RFC 9292 section 6)."""
    return tuple(
        (name.decode("latin-1").lower(), value.decode("latin-1"))
        for name, value in headers
        if name.lower() not in _OF_A_CONNECTION
    )
