"""Is what was sealed what was granted? Decides from an opened request, its grant and a clock value; the refusals go out sealed.

The inside may leave out a copy of an outer value, and never differ from the grant. The application's own server checks the
body against `lacre.call`; here are the parts that every sealed request has.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lacre import problems
from lacre.asgi import AUTHORITY, SCHEME, Opened, decoded_path
from lacre.inner import action_of
from lacre_fabric.grants import Grant

DATE_WINDOW: Final = 300.0  # seconds that a request's `date` may lie from this clock (RFC 9458 section 6.5.1)
# What some programs resolve (RFC 3986 section 5.2.4), merge or cut off, and others do not.
_AMBIGUOUS: Final = re.compile(r"/\.{1,2}(?:/|$)|//|[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class SealedRefusal:
    """What the worker answers, inside the seal, in place of the app. headers: beside the content type."""

    status: int
    body: Mapping[str, Any]
    media_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = field(default=())


def check(opened: Opened, grant: Grant, now: float) -> SealedRefusal | None:
    """None where the request may run. now: seconds since the epoch."""
    return _check_date(opened, now) or _check_path(opened) or _check_copies(opened, grant)


def _check_date(opened: Opened, now: float) -> SealedRefusal | None:
    try:
        (date,) = opened.headers("date")
        sent = email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):  # the second for numbers that no date can hold
        sent = float("-inf")
    if abs(sent - now) <= DATE_WINDOW:
        return None
    problem = problems.DATE
    body = {"type": problem.type, "title": problem.title, "status": problem.status}
    # With this clock's date beside it, so that the client can correct its own once (RFC 9458 section 6.5.2).
    mine = (("date", email.utils.formatdate(now, usegmt=True)),)
    return SealedRefusal(problem.status, body, problems.MEDIA_TYPE, mine)


def _check_path(opened: Opened) -> SealedRefusal | None:
    """No path that two programs could read differently: what is behind the app may be a file system or another server."""
    if _AMBIGUOUS.search(decoded_path(opened.request)) is None:
        return None
    message = "the path has dot segments, empty segments or control characters; send it in its normal form"
    error = {"message": message, "type": "invalid_request_error", "param": "path", "code": "invalid_path"}
    return SealedRefusal(400, {"error": error})


def _check_copies(opened: Opened, grant: Grant) -> SealedRefusal | None:
    request = opened.request
    if (request.scheme, request.authority) != (SCHEME, AUTHORITY):
        return _mismatch("authority")
    copies = {
        "lacre-pool": grant.pool,
        "lacre-model": grant.model,
        "lacre-action": grant.action,
        "lacre-max-tokens": str(grant.max_tokens),
        "lacre-shape": grant.shape,
    }
    for name, granted in copies.items():
        if any(value != granted for value in opened.headers(name)):
            return _mismatch(name.removeprefix("lacre-").replace("-", "_"))
    if action_of(request.method, decoded_path(request)) != grant.action:  # as the app will read it
        return _mismatch("action")
    return None


def _mismatch(what: str) -> SealedRefusal:
    message = f"the sealed request's {what} is not what the gateway granted"
    error = {"message": message, "type": "invalid_request_error", "param": what, "code": "grant_mismatch"}
    return SealedRefusal(403, {"error": error})
