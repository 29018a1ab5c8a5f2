"""The ASGI app of a worker whose models another program on its host serves. `create_app(settings)` makes one.

Rules:
- A request is forwarded only if its model's list has its method and path, and only to the granted model.
- By then it has been claimed in the whole pool (see `lacre_backend.node.node`), so the upstream runs it once.
- OpenAI's calls are limited by the grant in their body, and counted by the upstream's own `usage` (`bodies`, `counts`). Other
  requests, with the action `http`, are forwarded unchanged and counted by their bytes (`lacre.evidence.receipts.units`).
- Neither requests nor answers are logged.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from lacre.asgi import EXTENSION, App, Call, Disconnected, Receive, Scope, Send
from lacre.evidence.receipts import UNIT, units
from lacre.runtime.json_objects import object_in
from lacre.wire.records import EVENT_STREAM
from lacre_backend.api import listing
from lacre_backend.api.errors import RequestRefused, grant_mismatch, model_not_found
from lacre_backend.api.faces.refused import refused_at
from lacre_backend.api.http import EventStream, header, read_body, send_json, until_disconnect
from lacre_backend.api.registry import SALT_HEADER
from lacre_backend.api.requests import MAX_BODY
from lacre_backend.upstream import bodies, counts, events, refusals
from lacre_backend.upstream.faces import FACES, UpstreamFace
from lacre_backend.upstream.fields import Headers
from lacre_backend.upstream.origin import UpstreamRequest, UpstreamResponse
from lacre_backend.upstream.origins import Origins
from lacre_backend.upstream.settings import Upstream, UpstreamModel

MAX_ERROR: Final = 64 * 1024  # bytes of a forwarded error; one in OpenAI's form has a few hundred
_EVENT_STREAM: Final = EVENT_STREAM.encode()
_JSON: Final = b"application/json"


class BrokenOff(Exception):
    """The answer had begun and ended before it was complete. The client does not get its end."""


def create_app(settings: Upstream, origins: Origins) -> App:
    """origins: of the same settings."""
    return _Forward(settings, origins)


class _Forward:
    def __init__(self, settings: Upstream, origins: Origins) -> None:
        self._models = {model.name: model for model in settings.models}
        self._origins = origins
        self._salt_key = os.urandom(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await read_body(receive, MAX_BODY)
            await until_disconnect(receive, self._answer(scope, body, send))
        except RequestRefused as refusal:
            await send_json(send, refusal.status, refused_at(_path(scope), refusal))
        except Disconnected:
            return

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        call: Call = scope["extensions"][EXTENSION]
        model = self._models.get(str(call.model))
        if model is None:
            raise model_not_found(str(call.model))
        if any(name.lower() == b"content-encoding" for name, _ in scope["headers"]):
            raise refusals.coded()
        if call.action in ("explain", "lens"):  # its tokens could not be counted: no such server says how many it computes
            raise refusals.unknown_url(scope["method"], _path(scope))
        routes = [route for route in model.allow if route.takes(_path(scope))]
        if not any(route.method == scope["method"] for route in routes):
            if (scope["method"], _path(scope)) == ("GET", "/v1/models"):
                return await send_json(send, 200, _listing(self._models))
            refused = refusals.method_not_supported if routes else refusals.unknown_url
            raise refused(scope["method"], _path(scope))
        if call.action in bodies.ACTIONS:
            await self._speak(scope, body, send, call, model)
        else:
            await self._pass_on(scope, body, send, call)

    # Other than OpenAI's calls

    async def _pass_on(self, scope: Scope, body: bytes, send: Send, call: Call) -> None:
        counted = call.action == "http"
        if counted and call.max_prompt_tokens is not None and units(len(body)) > call.max_prompt_tokens:
            raise grant_mismatch(f"The request has more than the {call.max_prompt_tokens} KiB that were granted.", "body")
        query = scope["query_string"]
        target = _path(scope) + ("?" + query.decode("ascii") if query else "")
        async with self._origins.ask(UpstreamRequest(scope["method"], target, scope["headers"], body)) as answer:
            granted = call.max_tokens if counted else None
            if granted is not None and scope["method"] != "HEAD" and (answer.length or 0) > granted * UNIT:
                raise refusals.above_units(granted)
            if counted:
                call.usage.prompt_tokens = units(len(body))
            await _stream(answer, send, call, granted)

    # OpenAI's calls

    async def _speak(self, scope: Scope, body: bytes, send: Send, call: Call, model: UpstreamModel) -> None:
        fixed = {**model.fixed, **self._salt(scope, model)}
        face = FACES.get(_path(scope))
        ready = bodies.ready(body, call, model.known_as or model.name, frozenset(model.members), fixed, face=face)
        headers = [(b"content-type", _JSON), (b"accept", _EVENT_STREAM if ready.stream else _JSON)]
        async with self._origins.ask(UpstreamRequest(scope["method"], _path(scope), headers, ready.content)) as answer:
            if answer.status >= 400:
                return await _tell_error(answer, send)
            if not ready.stream:
                return await send_json(send, 200, await self._whole(answer, call, model, face))
            if answer.media_type != _EVENT_STREAM:
                raise refusals.unusable("does not stream")
            out = EventStream(send)
            try:
                if face is None:
                    await events.relay(answer.pieces, out, call, model.name, tell_usage=ready.tell_usage)
                else:
                    await events.relay_face(answer.pieces, out, call, model.name, face)
            except RequestRefused as refusal:
                if not out.started:
                    raise
                await out.broken(refused_at(_path(scope), refusal), None if face is None else "error")

    async def _whole(
        self, answer: UpstreamResponse, call: Call, model: UpstreamModel, face: UpstreamFace | None
    ) -> dict[str, Any]:
        document = object_in(await _read(answer.pieces))
        if document is None:
            raise refusals.unusable("does not answer with a JSON object")
        counts.take(call, document.get("usage") if face is None else face.counts(face.usage(document)))
        return {**document, "model": model.name}

    def _salt(self, scope: Scope, model: UpstreamModel) -> dict[str, str]:
        """The scope of the upstream's prefix cache, if it supports one. It is derived from the client's salt, so that each
        client has its own.

        A client without a salt shares nothing.
        """
        if model.salt is None:
            return {}
        salt = header(scope, SALT_HEADER) or os.urandom(16)
        return {model.salt: hmac.new(self._salt_key, salt, hashlib.sha256).hexdigest()}


def _path(scope: Scope) -> str:
    """As it was sent."""
    path: bytes = scope["raw_path"]
    return path.decode("ascii")


def _listing(models: Mapping[str, UpstreamModel]) -> dict[str, Any]:
    return listing.listed([listing.named(name, 0) for name in models])


async def _stream(answer: UpstreamResponse, send: Send, call: Call, granted: int | None) -> None:
    """granted: units of `lacre.evidence.receipts`, if the answer is counted in them."""
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    size = 0
    try:
        async for piece in answer.pieces:
            size += len(piece)
            if granted is not None:
                if units(size) > granted:
                    raise refusals.above_units(granted)
                call.usage.completion_tokens = units(size)
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except RequestRefused as refusal:
        raise BrokenOff(refusal.code) from None
    await send({"type": "http.response.body", "body": b""})


async def _tell_error(answer: UpstreamResponse, send: Send) -> None:
    """Forwards the upstream's own refusal unchanged: only the caller reads it."""
    content = await _read(answer.pieces, MAX_ERROR)
    headers: Headers = [(b"content-type", answer.header(b"content-type") or b"text/plain")]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def _read(pieces: AsyncIterator[bytes], limit: int | None = None) -> bytes:
    """limit: bytes, if less than the origin's own."""
    content = bytearray()
    async for piece in pieces:
        content += piece
        if limit is not None and len(content) > limit:
            raise refusals.too_large(limit)
    return bytes(content)
