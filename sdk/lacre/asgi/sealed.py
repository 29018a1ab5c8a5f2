"""`Sealed(app, keys=...)`: any ASGI app, sealed over plain HTTP, for clients that pin its key (`lacre.direct`).

Rules:
- Nothing reaches or leaves the app unsealed: an unsealed request gets a problem document.
- A request runs once. Its digest is remembered for longer than its date is valid, and dates from before this process began are
  refused. If several processes serve one key, they need a shared memory for this: `claim`.
- The app itself identifies its callers: fields such as `Authorization` come inside the seal.

The path and the way to publish a key follow RFC 9540: one path, `GET` for the key configurations, `POST` for requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Final

from lacre import problems
from lacre.asgi.admission import ReplayMemory, SealedRefusal, check_date, check_path, sent_at
from lacre.asgi.app_call import App, Call, Opened, Receive, Scope, Send, answer, open_sealed, refuse
from lacre.errors import AppFailed, LacreError, SettingsError, UnknownKeyId, UsageError
from lacre.jose.jws import b64u
from lacre.problems import Problem
from lacre.runtime import arguments, folders, private_files, tasks
from lacre.wire.header import (
    MAX_SEALED_REQUEST,
    MEDIA_TYPE_KEYS,
    MEDIA_TYPE_REQUEST,
    MEDIA_TYPE_RESPONSE,
    WELL_KNOWN,
    KeyConfig,
    encode_key_list,
)
from lacre.wire.opening import PrivateKey
from lacre.wire.padding import Shape, shape_named
from lacre.wire.wiping import overwrite

BODY_TIMEOUT: Final = 60.0  # seconds for a sealed request to arrive: 7 MiB at 1 Mbit/s
# bytes of all sealed requests that are being read: eighteen of the largest, or thousands of small ones
MAX_READING: Final = 128 * 2**20
MAX_KEY_ID: Final = 255  # one byte (RFC 9458 section 3)
_KEY_FILE_LIMIT: Final = 1024  # bytes; a key has some 60

Keys = Callable[[], Sequence[PrivateKey]]
Claim = Callable[[bytes], Awaitable[bool]]


class Sealed:
    """app: the app that answers. keys: what requests are sealed to, the preferred first; a callable is called each time, for
    rotation.

    claim: called with a request's digest (32 bytes) before it runs; False refuses it as a replay. For each digest it must
    return True only once in all processes that share a key, for `lacre.asgi.admission.REMEMBERED_FOR` seconds. path: of keys
    and requests. clock: seconds since the epoch. body_timeout: seconds for a sealed request to arrive. max_reading: bytes of
    all sealed requests that are being read.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: PrivateKey | Sequence[PrivateKey] | Keys,
        claim: Claim | None = None,
        path: str = WELL_KNOWN,
        clock: Callable[[], float] = time.time,
        body_timeout: float = BODY_TIMEOUT,
        max_reading: int = MAX_READING,
    ) -> None:
        arguments.function(app, "app")
        arguments.function(clock, "clock")
        arguments.text(path, "path")
        if claim is not None:
            arguments.function(claim, "claim")
        self._app = app
        arguments.instance(body_timeout, (int, float), "body_timeout")
        arguments.timeout(body_timeout)
        self._body_timeout = body_timeout
        self._max_reading = arguments.count(max_reading, "max_reading")
        self._keys = _keys(keys)
        self._claim = claim
        self._path = path
        self._clock = clock
        try:
            self._began = float(int(clock()))  # a `date` has whole seconds
        except (TypeError, ValueError, OverflowError) as exc:
            raise UsageError("clock must return seconds since the epoch") from exc
        self._seen = ReplayMemory()
        self._reading = 0  # bytes of incomplete requests

    @property
    def pins(self) -> tuple[str, ...]:
        """The pins for clients, one for each key."""
        return tuple(pin(key.config) for key in self._keys())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "sealed requests only"})
        elif scope["path"].removeprefix(scope.get("root_path", "")) != self._path:
            await _tell(send, problems.NOT_FOUND)
        elif scope["method"] in ("GET", "HEAD"):
            await _whole(send, 200, MEDIA_TYPE_KEYS, encode_key_list([key.config for key in self._keys()]))
        elif scope["method"] == "POST":
            await self._post(scope, receive, send)
        else:
            await _tell(send, problems.METHOD_NOT_ALLOWED, (b"allow", b"GET, HEAD, POST"))

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _header(scope, b"content-type").partition(b";")[0].strip().lower() != MEDIA_TYPE_REQUEST.encode():
            return await _tell(send, problems.UNSUPPORTED_MEDIA_TYPE)
        body = await self._body(scope, receive)
        if isinstance(body, Problem):
            later = ((b"retry-after", b"1"),) if body is problems.OVERLOADED else ()
            return await _tell(send, body, *later)
        try:
            opened = open_sealed(body, {key.config.key_id: key for key in self._keys()})
        except UnknownKeyId:
            return await _tell(send, problems.UNKNOWN_KEY)
        except LacreError:
            return await _tell(send, problems.INVALID_REQUEST)
        now, digest = self._clock(), opened.header.digest
        if self._seen.has(digest, now):
            return await _tell(send, problems.REPLAYED)
        refusal = check_date(opened, now, earliest=self._began, seen=self._seen)
        if refusal is None:  # remember only requests that may run
            if not self._seen.add(digest, now, sent_at(opened)) or not (self._claim is None or await self._claim(digest)):
                return await _tell(send, problems.REPLAYED)
            refusal = check_path(opened)
        await _while_connected(receive, self._answer(opened, refusal, send))

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Problem:
        """The sealed request. No caller is known before it is opened, so all requests that are being read share `max_reading`
        bytes.

        None may have more than is left for the others: however many fill it up, a short request finds room.
        """
        declared, body = _header(scope, b"content-length"), bytearray()
        if declared.isdigit() and int(declared[:20]) > MAX_SEALED_REQUEST:
            return problems.TOO_LARGE
        try:
            async with asyncio.timeout(self._body_timeout):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        return problems.INVALID_REQUEST  # cut short: the client has gone and reads no answer
                    piece: bytes = message.get("body", b"")
                    if len(body) + len(piece) > MAX_SEALED_REQUEST:
                        return problems.TOO_LARGE
                    if len(body) + len(piece) > self._max_reading - self._reading:
                        return problems.OVERLOADED
                    self._reading += len(piece)
                    body += piece
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            return problems.SLOW_BODY
        finally:
            self._reading -= len(body)

    async def _answer(self, opened: Opened, refusal: SealedRefusal | None, send: Send) -> None:
        headers = [(b"content-type", MEDIA_TYPE_RESPONSE.encode()), (b"incremental", b"?1"), (b"cache-control", b"no-store")]
        headers.append((b"x-accel-buffering", b"no"))  # an nginx in front would otherwise hold back the stream to its end
        async with aclosing(self._pieces(opened, refusal)) as pieces:
            try:
                first = await anext(pieces)  # an app that fails before it began can still be reported outside
            except AppFailed:
                await _tell(send, problems.INTERNAL)
                raise
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": first, "more_body": True})
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _pieces(self, opened: Opened, refusal: SealedRefusal | None) -> AsyncGenerator[bytes, None]:
        if refusal is not None:
            yield refuse(opened, refusal.status, refusal.body, refusal.media_type, refusal.headers)
            return
        call = Call(request_id=secrets.token_hex(16))
        async with aclosing(answer(self._app, opened, call, shape=_shape(opened))) as pieces:
            async for piece in pieces:
                yield piece


def pin(config: KeyConfig) -> str:
    """The pin of a key: base64url of the SHA-256 of its key configuration."""
    arguments.instance(config, KeyConfig, "config")
    return b64u(hashlib.sha256(config.encode()).digest())


def key_file(path: str | Path, key_id: int = 1) -> PrivateKey:
    """The private key in a file; if there is none, a new one that only its owner can read. Raises SettingsError."""
    path = folders.given(path, "path")
    if isinstance(key_id, bool) or not isinstance(key_id, int) or not 0 <= key_id <= MAX_KEY_ID:
        raise UsageError(f"key_id must be a whole number from 0 to {MAX_KEY_ID}")
    try:
        if not path.exists():
            _make_key_file(path, key_id)
    except OSError as exc:
        raise SettingsError(f"{path} cannot be written ({exc.strerror}): create its folder, or name another file") from exc
    try:
        with path.open("rb", buffering=0) as file:
            private_files.check(path, os.fstat(file.fileno()).st_mode)
            content = bytearray(_KEY_FILE_LIMIT)
            length = file.readinto(content) or 0
    except OSError as exc:
        raise SettingsError(f"{path} cannot be used ({exc.strerror}): name another file for the key") from exc
    try:
        return PrivateKey.from_bytes(memoryview(content)[:length])
    finally:
        overwrite(content)


def _make_key_file(path: Path, key_id: int) -> None:
    """If several processes start at once, all read the key of the first."""
    secret = PrivateKey.generate(key_id).to_bytes()
    try:
        with suppress(FileExistsError):
            private_files.create(path, secret)
    finally:
        overwrite(secret)


def _keys(keys: PrivateKey | Sequence[PrivateKey] | Keys) -> Keys:
    if callable(keys):
        return keys
    fixed = arguments.one_or_more(keys, PrivateKey, "keys")
    if len({key.config.key_id for key in fixed}) != len(fixed):
        raise UsageError("keys: one PrivateKey, or several with different key ids")
    return lambda: fixed


def _shape(opened: Opened) -> Shape:
    """The shape that the request asks for, inside the seal."""
    asked = opened.headers("lacre-shape")
    return shape_named(asked[0]) if asked in (["none"], ["pad"]) else "pad"


async def _while_connected(receive: Receive, answering: Coroutine[Any, Any, None]) -> None:
    """Ends the app when the caller has gone."""
    task = tasks.spawn("sealed answer", answering)
    gone = tasks.spawn("caller's departure", _disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
    finally:
        await tasks.end(task, gone, limit=2 * tasks.END_LIMIT)  # the first limit is the app's own


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _header(scope: Scope, name: bytes) -> bytes:
    headers: Mapping[bytes, bytes] = dict(scope["headers"])
    return headers.get(name, b"")


async def _tell(send: Send, problem: Problem, *headers: tuple[bytes, bytes]) -> None:
    await _whole(send, problem.status, problems.MEDIA_TYPE, problem.body(), *headers)


async def _whole(send: Send, status: int, media_type: str, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    fixed = [(b"content-type", media_type.encode()), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": fixed})
    await send({"type": "http.response.body", "body": body})
