"""May an opened request run here? Checks its date, its path, and whether it ran before. Decides from bytes and a clock value.

Rules:
- A request whose date is refused never runs, so nothing of it is remembered: anybody can make such requests.
- Memory is bounded. If a digest is forgotten early, its date is closed too: no request of that date runs again.

The refusals go out sealed. The worker checks the gateway's grant in `lacre_backend.node.grant_check`.
"""

from __future__ import annotations

import email.utils
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from lacre import problems
from lacre.asgi.app_call import Opened, decoded_path

DATE_WINDOW: Final = 300.0  # seconds that a request's `date` may be off from this clock (RFC 9458 section 6.5.1)
REMEMBERED_FOR: Final = 900.0  # seconds; more than twice the date window, so a forgotten request is too old to run
MAX_REMEMBERED: Final = 1_000_000  # digests; some 130 MB, and more requests than a process opens in a minute
# Some programs resolve (RFC 3986 section 5.2.4), merge or cut these off, and others do not.
_AMBIGUOUS: Final = re.compile(r"/\.{1,2}(?:/|$)|//|[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class SealedRefusal:
    """The sealed answer in place of the app's. headers: beside the content type."""

    status: int
    body: Mapping[str, Any]
    media_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = field(default=())


class ReplayMemory:
    """The digests of requests opened here in the last while: refuses a replay on its own.

    Call `check_date` first: a request that it refuses can never run, and costs no memory here. While the memory is full, the
    oldest dates are closed: no request of these dates runs, so their digests can be forgotten. Dates ahead of this clock cannot
    be forgotten early, and have a quarter of the memory. So a flood narrows the window of dates. It makes nothing run twice,
    and refuses no client whose clock is right.

    limit: how many digests. lifetime: seconds after its date for which one is remembered.
    """

    def __init__(self, limit: int = MAX_REMEMBERED, lifetime: float = REMEMBERED_FOR) -> None:
        self._limit = limit
        self._lifetime = lifetime
        self._digests: set[bytes] = set()
        self._by_second: dict[int, list[bytes]] = {}  # of their dates
        self._open_from = 0  # the second of the oldest accepted date
        self._ahead = 0  # digests of dates ahead of the clock
        self._looked = 0  # the second of the last search for digests to forget

    def has(self, digest: bytes, now: float) -> bool:
        """Whether the request was here before. now: seconds since the epoch, as everywhere in this class."""
        self._forget_old(now)
        return digest in self._digests

    def takes(self, sent: float, now: float) -> bool:
        """Whether a request of this date may still run; makes room for it."""
        self._forget_old(now)
        second, this = int(sent), int(now)
        if second < self._open_from or (second > this + 1 and self._ahead >= self._limit // 4):
            return False
        while len(self._digests) >= self._limit:
            oldest = min(self._by_second)
            if oldest >= min(second, this):
                return False
            self._forget(oldest)
            self._open_from = oldest + 1
        return True

    def add(self, digest: bytes, now: float, sent: float | None = None) -> bool:
        """False if the digest was known, or there is no room. sent: the request's date; None: now."""
        self._forget_old(now)
        if digest in self._digests or len(self._digests) >= self._limit:
            return False
        second = int(now if sent is None else sent)
        self._digests.add(digest)
        self._by_second.setdefault(second, []).append(digest)
        self._ahead += second > now
        return True

    def _forget_old(self, now: float) -> None:
        if int(now) == self._looked:
            return
        self._looked = int(now)
        for second in [second for second in self._by_second if second + self._lifetime <= now]:
            self._forget(second)
        self._ahead = sum(len(digests) for second, digests in self._by_second.items() if second > now)

    def _forget(self, second: int) -> None:
        self._digests.difference_update(self._by_second.pop(second))


def sent_at(opened: Opened) -> float:
    """The request's `date`, in seconds since the epoch; -inf if it has none that can be read."""
    try:
        (date,) = opened.headers("date")
        return email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, OverflowError):  # OverflowError: for numbers that no date can hold
        return float("-inf")


def check_date(
    opened: Opened, now: float, *, earliest: float = float("-inf"), seen: ReplayMemory | None = None
) -> SealedRefusal | None:
    """earliest: refuses dates before it, from before this process began. seen: refuses dates that
    it has closed.
    """  # fmt: skip
    sent = sent_at(opened)
    if abs(sent - now) <= DATE_WINDOW and sent >= earliest and (seen is None or seen.takes(sent, now)):
        return None
    problem = problems.DATE
    body = {"type": problem.type, "title": problem.title, "status": problem.status}
    # With this clock's date, so that the client can correct its own once (RFC 9458 section 6.5.2).
    mine = (("date", email.utils.formatdate(now, usegmt=True)),)
    return SealedRefusal(problem.status, body, problems.MEDIA_TYPE, mine)


def check_path(opened: Opened) -> SealedRefusal | None:
    """Refuses paths that two programs could read differently: behind the app may be a file system or another server."""
    if _AMBIGUOUS.search(decoded_path(opened.request)) is None:
        return None
    message = "the path has dot segments, empty segments or control characters; send it in its normal form"
    error = {"message": message, "type": "invalid_request_error", "param": "path", "code": "invalid_path"}
    return SealedRefusal(400, {"error": error})
