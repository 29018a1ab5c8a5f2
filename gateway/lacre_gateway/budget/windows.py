"""The windows that limits count in: minutes, days and months of UTC, each by its number. No clock here: the caller passes the
time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Final

from lacre_gateway.budget.plans import LimitKind

MINUTE: Final = 60
DAY: Final = 86400
_MONTHS: Final = 12
ALWAYS: Final = 0  # the only window of limits that do not count by time

# Of the kinds whose windows have one length.
SECONDS: Final = {LimitKind.REQUESTS_PER_MINUTE: MINUTE, LimitKind.TOKENS_PER_MINUTE: MINUTE, LimitKind.TOKENS_PER_DAY: DAY}


def window(kind: LimitKind, now: float) -> int:
    """The number of the window of `now`, in seconds since the epoch."""
    if kind in SECONDS:
        return int(now // SECONDS[kind])
    if kind is LimitKind.MONEY_PER_MONTH:
        date = datetime.fromtimestamp(now, UTC)
        return date.year * _MONTHS + date.month - 1
    return ALWAYS


def windows_at(now: float) -> dict[LimitKind, int]:
    """The window of every kind."""
    return {kind: window(kind, now) for kind in LimitKind}


@lru_cache(maxsize=64)
def bounds(kind: LimitKind, number: int) -> tuple[float, float]:
    """When the window begins and ends, in seconds since the epoch."""
    if kind in SECONDS:
        return float(number * SECONDS[kind]), float((number + 1) * SECONDS[kind])
    if kind is LimitKind.MONEY_PER_MONTH:
        return _month(number), _month(number + 1)
    return 0.0, math.inf


def ends(kind: LimitKind, number: int) -> float | None:
    """When the window ends, in seconds since the epoch; None for limits that do not count by time."""
    end = bounds(kind, number)[1]
    return end if math.isfinite(end) else None


def label(kind: LimitKind, number: int) -> str:
    """When the window begins, for people: `2026-11`, `2026-11-25` or `2026-11-25T22:41`; empty for limits that do not count by
    time.
    """
    if kind is LimitKind.CONCURRENT_STREAMS:
        return ""
    begin = datetime.fromtimestamp(bounds(kind, number)[0], UTC)
    if kind is LimitKind.MONEY_PER_MONTH:
        return f"{begin:%Y-%m}"
    return f"{begin:%Y-%m-%d}" if kind is LimitKind.TOKENS_PER_DAY else f"{begin:%Y-%m-%dT%H:%M}"


def _month(number: int) -> float:
    year, month = divmod(number, _MONTHS)
    return datetime(year, month + 1, 1, tzinfo=UTC).timestamp()


@dataclass(slots=True)
class Calendar:
    """The current window of every kind, computed once a minute."""

    begin: float = 0.0
    end: float = 0.0
    windows: dict[LimitKind, int] | None = None

    def at(self, now: float) -> dict[LimitKind, int]:
        if self.windows is None or not self.begin <= now < self.end:
            self.begin, self.end = bounds(LimitKind.REQUESTS_PER_MINUTE, window(LimitKind.REQUESTS_PER_MINUTE, now))
            self.windows = windows_at(now)
        return self.windows
