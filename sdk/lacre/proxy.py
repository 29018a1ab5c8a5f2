"""An OpenAI-compatible server on loopback that seals every request: for programs in any language (`lacre proxy`).

Rules:
- A caller must send the proxy's key. The key is the proxy's own; the gateway's token never leaves the proxy.
- A web page can make its browser send requests to loopback and, by DNS rebinding, under the page's own name. So the proxy
  refuses every `Host` that is not its own (see `hosts`), and every `Origin` that was not allowed.
- Answers from inside the seal are passed on piece by piece, as they open.
- Errors have the shape of the request's API and say what to do next. A stream that breaks ends with an error event, and never
  with `[DONE]`.
- Nothing of a request or an answer is logged.
- The header `lacre-pool` of an answer names the pool that it is sealed to. `GET /v1/models` also lists the manifest's routes,
  because programs choose from that list.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

import httpx2

from lacre import errors
from lacre.client import AsyncClient
from lacre.evidence.exchange_info import Facts
from lacre.exchange.refusal_shapes import explained, shaped, status_of
from lacre.exchange.request import ALLOWED_HEADERS, MAX_CONTENT
from lacre.exchange.retry import may_have_lost
from lacre.runtime import arguments
from lacre.runtime.json_objects import object_in
from lacre.runtime.served_hosts import Hosts, as_origin
from lacre.wire import outer
from lacre.wire.records import EVENT_STREAM

try:
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.cors import CORSMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ModuleNotFoundError as exc:
    raise ImportError("lacre proxy needs an extra: pip install 'lacre[proxy]'") from exc

METHODS: Final = ["GET", "POST", "PUT", "PATCH", "DELETE"]
PASSED_BACK: Final = (
    "allow",
    "content-type",
    "retry-after",
    "x-should-retry",
    "x-request-id",
    "request-id",
)
BODY_TIMEOUT: Final = 60.0  # seconds for a body; it comes from this machine
# Bytes of all bodies together, until their requests end: 18 of the largest. Sealing copies a body while it sends it.
HELD: Final = 128 * 1024 * 1024
RETRY_AFTER: Final = 1  # seconds; there is room again as soon as a request ends
_PASSED_ON: Final = ALLOWED_HEADERS | {outer.MODEL, outer.CEILING}
_UNBUFFERED: Final = {"x-accel-buffering": "no"}  # an nginx in front would otherwise hold back the stream to its end
_MODELS: Final = "/v1/models"
_BLANKS: Final = " \t"
_PLAIN: Final = re.compile(r"[\t -~]*")


@dataclass(frozen=True, slots=True)
class ProxyAccess:
    """Which callers are accepted. hosts: values of `Host`; origins: values of `Origin`, none by default."""

    key: str = field(repr=False)
    hosts: Hosts
    origins: frozenset[str] = frozenset()

    @classmethod
    def on(
        cls, port: int, key: str, *, names: Sequence[str] = (), origins: Sequence[str] = (), listening: str = "127.0.0.1"
    ) -> ProxyAccess:
        """names: of this machine, beside loopback's own names. listening: the socket's address.

        Raises UsageError for an invalid key. Raises SettingsError for a name that cannot be a `Host`, or an origin that no
        browser sends.
        """
        if not arguments.text(key, "key").isascii():
            raise errors.UsageError("key has characters that a header cannot carry: use ASCII")
        for name in names:
            arguments.text(name, "a name of this machine")
        for origin in origins:
            arguments.text(origin, "an origin that may call")
        return cls(key, Hosts.of(listening, port, names), frozenset(map(as_origin, origins)))


def create_app(client: AsyncClient, door: ProxyAccess, held: int = HELD) -> ASGIApp:
    """The server, as an ASGI app. The caller closes the client. held: bytes of all bodies together."""
    cors = Middleware(CORSMiddleware, allow_origins=sorted(door.origins), allow_methods=METHODS, allow_headers=["*"])
    middleware = [
        Middleware(_Guard, check=lambda request: _check_address(request, door)),
        *([cors] if door.origins else []),
        Middleware(_Guard, check=lambda request: _check_key(request, door)),
        Middleware(_Bodies, most=held),
    ]
    app = Starlette(
        routes=[Route("/v1/{path:path}", _forward, methods=METHODS), Route("/infill", _forward, methods=METHODS)],
        middleware=middleware,
        exception_handlers={404: _not_found, 405: _not_allowed, errors.LacreError: _failed},
    )
    app.state.client = client
    return app


class _Guard:
    """Answers with a refusal if a check finds one. Pure ASGI: it never holds back a stream."""

    def __init__(self, app: ASGIApp, check: Callable[[Request], Response | None]) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # a lifespan that was not requested, or a WebSocket, which this closes
        refusal = self._check(Request(scope))
        await (self._app if refusal is None else refusal)(scope, receive, send)


class _Full(Exception):
    """There is no room for more bytes of bodies now."""


class _Bodies:
    """Counts the bytes of bodies, from before they are read until their request ends. most: of all requests together."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._left = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if size > self._left:
                raise _Full
            self._left -= size
            taken += size

        scope.setdefault("state", {})["take"] = take
        try:
            await self._app(scope, receive, send)
        finally:
            self._left += taken


def _check_address(request: Request, door: ProxyAccess) -> Response | None:
    hosts, origins = request.headers.getlist("host"), request.headers.getlist("origin")
    if len(hosts) != 1 or not door.hosts.know(hosts[0]):
        message = (
            f"This proxy only accepts the hosts {door.hosts}. Use one of them in the base URL, or start the "
            "proxy with --allow-host NAME."
        )
        return _error(request, 421, "host", message)
    if any(origin not in door.origins for origin in origins):
        return _error(
            request, 403, "origin", "A web page may use this proxy only if it was started with --allow-origin for that page."
        )
    return None


def _check_key(request: Request, door: ProxyAccess) -> Response | None:
    bearers, keys = request.headers.getlist("authorization"), request.headers.getlist("x-api-key")  # Anthropic's is the second
    sent = [*map(_bearer, bearers), *(key.strip(_BLANKS) for key in keys)]
    right = [hmac.compare_digest(each.encode("latin-1"), door.key.encode("latin-1")) for each in sent]
    if sent and all(right) and len(bearers) <= 1 and len(keys) <= 1:
        return None
    message = (
        "Send the key that `lacre proxy` printed (or keeps in its --key-file) as a bearer token or as `x-api-key`: "
        "OPENAI_API_KEY, ANTHROPIC_API_KEY or api_key."
    )
    refusal = _error(request, 401, "invalid_api_key", message)
    refusal.headers["www-authenticate"] = "Bearer"
    return refusal


def _bearer(sent: str) -> str:
    """The token; empty for another scheme. RFC 9110 sections 11.1 and 11.4: any case, one blank or more."""
    scheme, _, key = sent.strip(_BLANKS).partition(" ")
    return key.lstrip(_BLANKS) if scheme.lower() == "bearer" else ""


async def _forward(request: Request) -> Response:
    client: AsyncClient = request.app.state.client
    headers = _passed_on(request)
    path = request.scope["raw_path"].decode("ascii")
    query = request.scope["query_string"].decode("ascii")
    try:
        content = await _body(request)
    except ClientDisconnect:
        return Response(status_code=499)  # the client has gone
    except TimeoutError:
        return _error(
            request, 408, "slow_body", f"The request's body did not arrive within {BODY_TIMEOUT:.0f} s: send it again."
        )
    except _Full:
        refusal = _error(request, 503, "overloaded", "Running requests leave no room for this body: send it again.")
        refusal.headers["retry-after"] = str(RETRY_AFTER)
        return refusal
    sealed = client.build_request(
        request.method, httpx2.URL(path + (f"?{query}" if query else "")), headers=headers, content=content or None
    )
    answer = await client.send(sealed, stream=True)
    passed = {name: answer.headers[name] for name in PASSED_BACK if name in answer.headers} | _UNBUFFERED | _served(answer)
    if (request.method, path, answer.status_code) == ("GET", _MODELS, 200):
        return Response(_with_routes(await answer.aread(), await client.models()), 200, passed)
    named = unquote(path.removeprefix(f"{_MODELS}/"))
    if (request.method, answer.status_code) == ("GET", 404) and named in await client.models():
        await answer.aclose()
        return JSONResponse(_route_named(named), 200, passed | {"content-type": "application/json"})
    return StreamingResponse(_pieces(answer, path), answer.status_code, passed)


def _served(answer: httpx2.Response) -> dict[str, str]:
    facts: Facts | None = answer.extensions.get("lacre")
    return {outer.POOL: facts.pool} if facts is not None and facts.pool else {}


def _with_routes(content: bytes, names: Sequence[str]) -> bytes:
    """The worker's list of models, and after it the other names that a request may have. Any other document stays as it is."""
    listed = object_in(content) or {}
    data = listed.get("data")
    if not isinstance(data, list):
        return content
    known = {model.get("id") for model in data if isinstance(model, dict)}
    more = [_route_named(name) for name in names if name not in known]
    return json.dumps({**listed, "data": [*data, *more]}).encode() if more else content


def _route_named(name: str) -> dict[str, Any]:
    """As a worker describes one of its models."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "lacre"}


def _passed_on(request: Request) -> list[tuple[str, str]]:
    """The headers to pass on. Raises UsageError for a header that is not plain text, or is repeated: programs read such a
    header differently.
    """
    headers = [(name, value) for name, value in request.headers.items() if name in _PASSED_ON]
    for name, value in headers:
        if _PLAIN.fullmatch(value) is None or len(request.headers.getlist(name)) > 1:
            raise errors.UsageError(f"the header {name} must appear once, in ASCII characters: correct it, or omit it")
    return headers


async def _body(request: Request) -> bytes:
    """The body. Raises MessageTooLarge and _Full before buffering it, ClientDisconnect, and TimeoutError."""
    declared = request.headers.get("content-length", "")
    content = bytearray()
    async with asyncio.timeout(BODY_TIMEOUT):
        if declared.isdecimal() and int(declared) > MAX_CONTENT:
            raise errors.MessageTooLarge(f"a request body may hold {MAX_CONTENT} bytes; send a smaller one")
        async for piece in request.stream():
            if len(content) + len(piece) > MAX_CONTENT:
                raise errors.MessageTooLarge(f"a request body may hold {MAX_CONTENT} bytes; send a smaller one")
            request.state.take(len(piece))
            content += piece
    return bytes(content)


async def _pieces(answer: httpx2.Response, path: str) -> AsyncIterator[bytes]:
    """The body as it opens. If it breaks, an event stream gets an error event, and any other body breaks too."""
    stream = answer.stream  # not `aiter_raw`: a refusal did not come from a network, and was read when it was made
    assert isinstance(stream, httpx2.AsyncByteStream)  # noqa: S101 - true of every answer of an async client
    try:
        async with aclosing(answer):
            async for piece in stream:
                yield piece
    except errors.LacreError as exc:
        if not answer.headers.get("content-type", "").startswith(EVENT_STREAM):
            raise
        # In the form that clients of every API here take for an error: by its name, its type, or its member `error`.
        told = {"type": "error", **shaped(path, status_of(exc), explained(exc)["error"])}
        yield b"\n\nevent: error\ndata: " + json.dumps(told).encode() + b"\n\n"


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.LacreError)  # noqa: S101 - registered only for these
    status = status_of(error)
    headers = {"x-should-retry": "false"} if may_have_lost(error) else None  # OpenAI's header; the client has already retried
    return JSONResponse(shaped(request.url.path, status, explained(error)["error"]), status, headers)


async def _not_found(request: Request, _exc: Exception) -> Response:
    return _error(
        request, 404, "unknown_url", f"{request.url.path} does not exist here: the base URL of this proxy ends in /v1."
    )


async def _not_allowed(request: Request, _exc: Exception) -> Response:
    return _error(request, 405, "method_not_supported", f"This proxy does not pass on the method {request.method}.")


def _error(request: Request, status: int, code: str, message: str) -> Response:
    told = {"message": message, "type": "lacre_proxy", "param": None, "code": code}
    return JSONResponse(shaped(request.url.path, status, told), status)
