"""May an opened request run here? Its date, its path, and whether it was here before. Decides from bytes and a clock value.

The refusals go out sealed. What a gateway's grant adds to this is the worker's own (`lacre_backend.inside`).
"""

from __future__ import annotations

import email.utils
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lacre import problems
from lacre.asgi.exchange import Opened, decoded_path

DATE_WINDOW: Final = 300.0  # seconds that a request's `date` may lie from this clock (RFC 9458 section 6.5.1)
REMEMBERED_FOR: Final = 900.0  # seconds; more than twice the date window, so what is forgotten is too old to run
MAX_REMEMBERED: Final = 1_000_000  # digests; some 100 MB, and more requests than a process answers in that time
# What some programs resolve (RFC 3986 section 5.2.4), merge or cut off, and others do not.
_AMBIGUOUS: Final = re.compile(r"/\.{1,2}(?:/|$)|//|[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class SealedRefusal:
    """What is answered, inside the seal, in place of the app. headers: beside the content type."""

    status: int
    body: Mapping[str, Any]
    media_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = field(default=())


class Seen:
    """The digests of requests opened here in the last while: refuses a replay on its own.

    limit: how many. While all of them still count, no more is taken: a flood must not make it forget.
    lifetime: seconds that one is remembered.
    """

    def __init__(self, limit: int = MAX_REMEMBERED, lifetime: float = REMEMBERED_FOR) -> None:
        self._limit = limit
        self._lifetime = lifetime
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def add(self, digest: bytes, now: float) -> bool:
        """False where the digest was there, or there is no room."""
        while self._until and next(iter(self._until.values())) <= now:
            self._until.popitem(last=False)
        if digest in self._until or len(self._until) >= self._limit:
            return False
        self._until[digest] = now + self._lifetime
        return True


def check_date(opened: Opened, now: float, *, earliest: float = float("-inf")) -> SealedRefusal | None:
    """earliest: a date before it is refused too; what ran before this process began is not in its memory."""
    try:
        (date,) = opened.headers("date")
        sent = email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):  # the second for numbers that no date can hold
        sent = float("-inf")
    if abs(sent - now) <= DATE_WINDOW and sent >= earliest:
        return None
    problem = problems.DATE
    body = {"type": problem.type, "title": problem.title, "status": problem.status}
    # With this clock's date beside it, so that the client can correct its own once (RFC 9458 section 6.5.2).
    mine = (("date", email.utils.formatdate(now, usegmt=True)),)
    return SealedRefusal(problem.status, body, problems.MEDIA_TYPE, mine)


def check_path(opened: Opened) -> SealedRefusal | None:
    """No path that two programs could read differently: what is behind the app may be a file system or another server."""
    if _AMBIGUOUS.search(decoded_path(opened.request)) is None:
        return None
    message = "the path has dot segments, empty segments or control characters; send it in its normal form"
    error = {"message": message, "type": "invalid_request_error", "param": "path", "code": "invalid_path"}
    return SealedRefusal(400, {"error": error})
