"""Gives every request an id, and logs its end. `AccessLog` is pure ASGI: it passes answers on unchanged, piece by piece.
Sealed requests do not come through ASGI: their connection uses `RequestLog` itself.

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
from lacre_gateway.http.headers import address_of
from lacre_gateway.http.line_limit import LineLimit
from lacre_gateway.http.refusal import NO_FACTS

# In the scope's state: fields about the refusal that was sent (`Refusal.said`); whether the caller has a valid token; further
# fields about a failed request.
REFUSED: Final = "refused"
KNOWN: Final = "known"
FACTS: Final = "facts"
_ADMIN: Final = frozenset(
    {
        "/metrics", "/openapi.json", "/v1/status", "/v1/usage", "/v1/tenants", "/v1/revocations", "/v1/reload", "/v1/drain",
        "/v1/budgets/top-up", "/v1/budgets/reset",
    }
)  # fmt: skip
_CONSOLE: Final = frozenset(
    {
        "/v1/minutes", "/v1/workers", "/v1/requests", "/v1/requests/detail", "/v1/requests/usage", "/v1/requests/proof",
        "/v1/policy", "/v1/policy/test", "/v1/policy/replay", "/v1/keys", "/v1/checkpoint", "/v1/audit/verify",
        "/v1/console/links", "/console", "/console/", "/console/sign-in", "/console/start", "/console/callback",
        "/console/open", "/console/sign-out", "/console/me", "/console/tenants", "/console/tenants.csv", "/console/tenant",
        "/console/top-up", "/console/reset",
        "/console/revoke", "/console/requests", "/console/request", "/console/proof", "/console/policy",
        "/console/policy/test", "/console/policy/replay", "/console/policy/reload", "/console/keys", "/console/workers",
        "/console/drain", "/console/audit", "/console/audit/verify", "/console/audit/checkpoint", "/console/audit/export",
        "/console/static/style.css", "/console/static/live.mjs", "/console/static/icon.svg",
    }
)  # fmt: skip
_ROUTES: Final = frozenset({"/v1/sealed", "/v1/manifest", "/v1/me/usage", "/healthz", "/readyz"}) | _ADMIN | _CONSOLE
_FAILED: Final = 400
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Probes arrive every few seconds, so only their failures are logged.
_PROBES: Final = frozenset({"/healthz", "/readyz", "/metrics"})


class RequestLog:
    """Writes the line of each request. log: where to. lines: of all listeners of the process."""

    def __init__(self, log: Log, lines: LineLimit) -> None:
        self._log = log
        self._lines = lines

    def ended(
        self,
        *,
        request_id: str,
        method: str,
        path: str,
        status: int | None,
        whole: bool,
        since: float,
        address: str,
        known: bool,
        refused: Mapping[str, str],
        facts: Mapping[str, str],
    ) -> None:
        """since: when it began, on the monotonic clock. known, refused, facts: as `KNOWN`, `REFUSED` and `FACTS`."""
        route, said = path if path in _ROUTES else "unknown", {**facts, **refused}
        if not refused and status is not None and status < _FAILED:
            said = {}
        if "problem" in said and not known:
            worth_a_line = self._lines.allows(address, said["problem"], said.get("reason", ""))
        else:
            worth_a_line = route not in _PROBES or status != 200
        if worth_a_line:
            self._log.info(
                "request",
                request_id=request_id,
                method=method if method in _METHODS else "other",
                route=route,
                status=status,
                outcome="whole" if whole else "cut",
                duration=round(time.monotonic() - since, 6),
                address=address,
                **said,
            )


class AccessLog:
    """app: any ASGI app. log: where to."""

    def __init__(self, app: ASGIApp, log: RequestLog) -> None:
        self._app = app
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
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
            self._log.ended(
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                whole=whole,
                since=since,
                address=address_of(scope),
                known=KNOWN in state,
                refused=state.get(REFUSED, NO_FACTS),
                facts=state.get(FACTS, NO_FACTS),
            )
