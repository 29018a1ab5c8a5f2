"""Gives every request an id, and logs its end. Pure ASGI: it passes answers on unchanged, piece by piece.

The log has a request's route but not its path, and no headers: a path may hold text that a caller pasted into it.
"""

from __future__ import annotations

import secrets
import time
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lacre_fabric.logs import Log
from lacre_gateway.http.exchange import CUT, REFUSED
from lacre_gateway.http.headers import address_of
from lacre_gateway.http.refusal import Refusal

_ADMIN: Final = frozenset(
    {"/metrics", "/openapi.json", "/v1/status", "/v1/usage", "/v1/revocations", "/v1/reload", "/v1/drain"}
)
_ROUTES: Final = frozenset({"/v1/sealed", "/v1/manifest", "/healthz", "/readyz"}) | _ADMIN
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Probes arrive every few seconds, so only their failures are logged.
_PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})


class AccessLog:
    """app: any ASGI app. log: where to."""

    def __init__(self, app: ASGIApp, log: Log) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = request_id
        since = time.monotonic()
        status: int | None = None
        whole = False

        async def record(message: Message) -> None:
            nonlocal status, whole
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"lacre-request-id", request_id.encode())]
            elif message["type"] == "http.response.body":
                whole = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, record)
        finally:
            route = scope["path"] if scope["path"] in _ROUTES else "unknown"
            if route not in _PROBES or status != 200:
                self._log.info(
                    "request",
                    request_id=request_id,
                    method=scope["method"] if scope["method"] in _METHODS else "other",
                    route=route,
                    status=status,
                    outcome="whole" if whole and CUT not in scope["state"] else "cut",
                    duration=round(time.monotonic() - since, 6),
                    address=address_of(scope),
                    **_said(scope["state"].get(REFUSED)),
                )


def _said(refusal: Refusal | None) -> dict[str, str]:
    """The fault in fixed words: of a token the claim and the reason, but none of its values."""
    if refusal is None:
        return {}
    reason = ": ".join(str(refusal.details[name]) for name in ("claim", "reason") if name in refusal.details)
    reason = reason or refusal.noted
    return {"problem": refusal.problem.slug, **({"reason": reason} if reason else {})}
