"""Checks that the pool's claims can be written, and that this machine's clock is right. A worker without claims may answer no
request.

A worker tries a claim of its own at intervals. The NATS server's timestamp on it is compared with this machine's clock, which
decides about grants, dates and the manifest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from lacre.errors import LacreError
from lacre_backend.node.readiness import Reason

EVERY: Final = 10.0  # seconds between tries: 90 entries of a bucket that holds 220,000
FAILURES: Final = 2  # in a row: one try may fail while NATS elects a leader
CLOCK: Final = 60.0  # seconds; beyond it grants are refused (`lacre_fabric.work.grants.MAX_SKEW`)


class ClaimsProbe:
    """Tries a claim at intervals, and compares clocks.

    claim: writes a dummy claim and returns the server's time, if known. clock: this machine's. Both in seconds since the epoch.
    """

    def __init__(self, claim: Callable[[], Awaitable[float | None]], *, clock: Callable[[], float] = time.time) -> None:
        self._claim = claim
        self._clock = clock
        self._failures = 0
        self._failure = ""
        self._ahead = 0.0

    def reason(self) -> Reason | None:
        """The result of the last checks."""
        if self._failures >= FAILURES:
            remedy = "check the bucket with `lacre fabric check`"
            return Reason("claims", f"the pool's claims cannot be written: {self._failure}", remedy)
        if abs(self._ahead) > CLOCK:
            told = f"{abs(self._ahead):.0f} s {'ahead of' if self._ahead > 0 else 'behind'} the NATS server's"
            return Reason("clock", f"this machine's clock is {told}", "synchronize both clocks with NTP")
        return None

    async def watch(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(EVERY)

    async def look(self) -> None:
        before = self._clock()
        try:
            there = await self._claim()
        except LacreError as exc:
            self._failures += 1
            self._failure = str(exc)
            return
        after = self._clock()
        self._failures = 0
        # The server made the timestamp between the two: only a difference outside of them is the clock's fault.
        if there is not None:
            self._ahead = before - there if there < before else min(0.0, after - there)
