"""Limits how many calls a minute one address may make to the manifest and to the admin listener; slowapi counts them.

Sealed requests have limits of their own: `lacre_gateway.auth.throttle`, plans and `budget.in_flight`. Health checks have none,
because a load balancer or kubelet makes them from one address.

Rules:
- A call is counted before its token is checked and before its body is read.
- slowapi skips a call whose key is empty, so no key is empty. Its own settings (`.env`, `RATELIMIT_*`) do not switch it off.
- slowapi's middleware is not used: it skips all routes of an included router (docs/decisions/slowapi.md).
"""

from __future__ import annotations

import time
from typing import Final

from fastapi import FastAPI, Request, Response
from slowapi import Limiter
from slowapi.errors import RateLimitExceeded

from lacre import problems
from lacre.errors import Details
from lacre.runtime.listening import network_of
from lacre_gateway.http.answers import problem_response
from lacre_gateway.http.headers import address_of
from lacre_gateway.http.refusal import Refusal

NAME: Final = "calls_per_address"  # of the limit, in the settings and in problem documents
_UNKNOWN: Final = "unknown"  # all callers without a known address share one count


class AddressLimit:
    """The limit of one app, over all its limited routes together. per_minute: calls of one address or IPv6 /64.

    `ceiling` may change it while the app serves.
    """

    def __init__(self, per_minute: int) -> None:
        self.ceiling = per_minute
        self._limiter = Limiter(_network, storage_uri="memory://", strategy="fixed-window", key_style="endpoint")
        self._limiter.enabled = True  # even if `RATELIMIT_ENABLED` says no
        self._limiter.logger.propagate = False  # it would log the address; the access log has each refusal
        self.check = self._limiter.limit(lambda: f"{self.ceiling}/minute")(_counted)

    def install(self, app: FastAPI) -> None:
        """For the app's routes that depend on `check`, a FastAPI dependency."""
        app.add_exception_handler(RateLimitExceeded, self._answer)

    def _answer(self, request: Request, _error: Exception) -> Response:
        limit, keys = request.state.view_rate_limit
        seconds = self._limiter.limiter.get_window_stats(limit, *keys).reset_time - time.time()
        details: Details = {"limit": NAME, "scope": "address", "ceiling": self.ceiling, "unit": "requests"}
        refusal = Refusal(problems.RATE_LIMITED, retry_after=max(seconds, 0.0), details=details)
        return problem_response(request, refusal)


async def _counted(request: Request) -> None:
    """The function that slowapi counts. slowapi raises RateLimitExceeded instead of calling it."""


def _network(request: Request) -> str:
    return network_of(address_of(request.scope)) or _UNKNOWN
