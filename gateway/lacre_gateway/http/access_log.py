"""Gives every request an id, and logs its end. Pure ASGI: it passes answers on unchanged, piece by piece.

Rules:
- The log has a request's route but not its path, and no headers: a path may hold text that a caller pasted into it.
- A refusal's line has the problem and its reason. It names the pool and the model only if the manifest has them.
- Callers without a valid token can cause only so many lines (`line_limit`).
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lacre_fabric.logs import Log
from lacre_gateway.http.exchange import CUT, FACTS, KNOWN, REFUSED
from lacre_gateway.http.headers import address_of
from lacre_gateway.http.line_limit import LineLimit
from lacre_gateway.http.refusal import Refusal

_ADMIN: Final = frozenset(
    {
        "/metrics", "/openapi.json", "/v1/status", "/v1/usage", "/v1/tenants", "/v1/revocations", "/v1/reload", "/v1/drain",
        "/v1/budgets/top-up", "/v1/budgets/reset",
    }
)  # fmt: skip
_ROUTES: Final = frozenset({"/v1/sealed", "/v1/manifest", "/v1/me/usage", "/healthz", "/readyz"}) | _ADMIN
_FAILED: Final = 400
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Probes arrive every few seconds, so only their failures are logged.
_PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})


class AccessLog:
    """app: any ASGI app. log: where to. lines: of all listeners of the process."""

    def __init__(self, app: ASGIApp, log: Log, lines: LineLimit) -> None:
        self._app = app
        self._log = log
        self._lines = lines

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
            route, said = scope["path"] if scope["path"] in _ROUTES else "unknown", _said(scope["state"], status)
            if self._worth_a_line(scope, route, status, said):
                self._log.info(
                    "request",
                    request_id=request_id,
                    method=scope["method"] if scope["method"] in _METHODS else "other",
                    route=route,
                    status=status,
                    outcome="whole" if whole and CUT not in scope["state"] else "cut",
                    duration=round(time.monotonic() - since, 6),
                    address=address_of(scope),
                    **said,
                )

    def _worth_a_line(self, scope: Scope, route: str, status: int | None, said: Mapping[str, str]) -> bool:
        if "problem" in said and KNOWN not in scope["state"]:
            return self._lines.allows(address_of(scope), said["problem"], said.get("reason", ""))
        return route not in _PROBES or status != 200


def _said(state: Mapping[str, Any], status: int | None) -> dict[str, str]:
    """The facts of a failed request, and the fault in fixed words: of a token the claim and the reason, but no value."""
    refusal: Refusal | None = state.get(REFUSED)
    facts: dict[str, str] = state.get(FACTS, {})
    if refusal is None:
        return {} if status is not None and status < _FAILED else facts
    told = {name: str(refusal.details[name]) for name in ("limit", "scope") if name in refusal.details}
    reason = refusal.noted or ": ".join(str(refusal.details[name]) for name in ("claim", "reason") if name in refusal.details)
    if not reason and "limit" in told:
        reason = f"limit: {told['limit']}"
    said = {"problem": refusal.problem.slug, **({"reason": reason} if reason else {})}
    return {**facts, **said, **told, **refusal.facts}
