"""Pages of other origins (Fetch, section 3.2, "CORS protocol"): only those that the settings name may read answers.

Rules:
- An origin is never reflected unless it is one of the list, and there is no `*`.
- Credentials of the browser are never allowed: a page passes its own token in `Authorization`.
- A page may read the proof, the request's id and when to come back, because its client verifies and reports them.
- Without a list nothing here runs, and a preflight is a wrong method like any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lacre.evidence import audit_proof
from lacre.wire import outer
from lacre.wire.header import MANIFEST_VERSION
from lacre_gateway.http.refusal import RawHeaders

MAX_AGE: Final = 600  # seconds for which a browser keeps a preflight's answer: after that, a removed origin is refused
_EXPOSED: Final = ", ".join((audit_proof.HEADER, MANIFEST_VERSION, "lacre-request-id", "retry-after")).encode()
_ASKED: Final = ", ".join(
    (
        *("authorization", "dpop", "content-type", "accept", "incremental"),
        *(outer.POOL, outer.MODEL, outer.ACTION, outer.CEILING, outer.CEILING_IS_DEFAULT, outer.SHAPE, outer.AFFINITY),
    )
).encode()
_METHODS: Final = {"/v1/sealed": b"POST", "/v1/manifest": b"GET", "/v1/me/usage": b"GET"}
_VARY: Final = (b"vary", b"origin")  # so that no cache gives the answer for one page to another


class AllowedPages:
    """origins: as a browser writes them, such as `https://app.example`."""

    def __init__(self, origins: Iterable[str] = ()) -> None:
        self._origins = frozenset(each.encode() for each in origins)

    def __bool__(self) -> bool:
        return bool(self._origins)

    def allowed(self, fields: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The origin of the request, if it is one of the list; not if there are two."""
        named = [value for name, value in fields if name == b"origin"]
        return named[0] if len(named) == 1 and named[0] in self._origins else None

    def fields(self, fields: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
        """Of the answer to a request with these fields; names in lower case."""
        if not self._origins:
            return []
        origin = self.allowed(fields)
        if origin is None:
            return [_VARY]
        return [_VARY, (b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]


class Preflights:
    """Answers preflights of allowed pages, and adds the fields to all other answers. app: any ASGI app."""

    def __init__(self, app: ASGIApp, pages: AllowedPages) -> None:
        self._app = app
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        fields = self._pages.fields(scope["headers"])

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *fields]
            await send(message)

        method = _METHODS.get(scope["path"])
        asks = scope["method"] == "OPTIONS" and any(name == b"access-control-request-method" for name, _ in scope["headers"])
        if not asks or method is None or self._pages.allowed(scope["headers"]) is None:
            await self._app(scope, receive, marked)
            return
        headers = [
            (b"access-control-allow-methods", method),
            (b"access-control-allow-headers", _ASKED),
            (b"access-control-max-age", b"%d" % MAX_AGE),
        ]
        await marked({"type": "http.response.start", "status": 204, "headers": headers})
        await marked({"type": "http.response.body", "body": b""})
