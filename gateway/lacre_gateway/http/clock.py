"""One clock for all running requests, in place of a timer for each limit of each request.

Rules:
- It ticks every `TICK` seconds while requests run, and asks each of them whether it is late. So a limit may be exceeded by a
  tick, and is never shortened.
- It has no task that could die: each tick orders the next one before it asks. A request that fails to answer is logged, and
  keeps no other from this tick.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from lacre.runtime import tasks

TICK: Final = 0.25  # seconds; the shortest limit of a request is some seconds


class Supervised(Protocol):
    def late(self, now: float) -> None:
        """Ends what has lasted too long. now: on the monotonic clock."""


class Clock:
    """Used on one event loop."""

    def __init__(self) -> None:
        self._live: set[Supervised] = set()
        self._next: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many requests it asks."""
        return len(self._live)

    def add(self, request: Supervised) -> None:
        self._live.add(request)
        if self._next is None:
            self._next = asyncio.get_running_loop().call_later(TICK, self._tick)

    def remove(self, request: Supervised) -> None:
        self._live.discard(request)

    def _tick(self) -> None:
        self._next = asyncio.get_running_loop().call_later(TICK, self._tick) if self._live else None
        now = time.monotonic()
        for request in tuple(self._live):
            try:
                request.late(now)
            except Exception as exc:  # noqa: BLE001 - a fault in one request must not give the others all the time they like
                tasks.failed("clock", exc)
