"""Checks that a sealed request matches its grant. It decides from the opened request, its grant and a clock value. Refusals are
sent sealed.

The sealed request may omit copies of outer values, but must never differ from the grant. If its caller named no ceiling, it has
the most that may be granted. The application's own server checks the body against `lacre.call`; this module checks the parts
that every sealed request has.
"""

from __future__ import annotations

from lacre.asgi import AUTHORITY, SCHEME, Opened, decoded_path
from lacre.asgi.admission import SealedRefusal, check_date, check_path
from lacre.exchange.request import may_be
from lacre.wire import outer
from lacre_fabric.work.grants import Grant


def check(opened: Opened, grant: Grant, now: float) -> SealedRefusal | None:
    """None if the request may run. now: seconds since the epoch."""
    return check_date(opened, now) or check_path(opened) or _check_copies(opened, grant)


def _check_copies(opened: Opened, grant: Grant) -> SealedRefusal | None:
    request = opened.request
    if (request.scheme, request.authority) != (SCHEME, AUTHORITY):
        return _mismatch("authority")
    copies = {
        outer.POOL: grant.pool,
        outer.MODEL: grant.model,
        outer.ACTION: grant.action,
        outer.CEILING: str(grant.max_tokens),
        outer.SHAPE: grant.shape,
    }
    for name, granted in copies.items():
        if any(value != granted for value in opened.headers(name)):
            return _mismatch(name.removeprefix("lacre-").replace("-", "_"))
    for value in opened.headers(outer.MOST):
        most = outer.ceiling_in(value)
        if most is None or grant.max_tokens > most:
            return _mismatch("max_tokens")
    if not may_be(grant.action, request.method, decoded_path(request)):  # as the app will read it
        return _mismatch("action")
    return None


def _mismatch(what: str) -> SealedRefusal:
    message = f"the sealed request's {what} is not what the gateway granted"
    error = {"message": message, "type": "invalid_request_error", "param": what, "code": "grant_mismatch"}
    return SealedRefusal(403, {"error": error})
