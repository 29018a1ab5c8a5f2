"""Whether the pool's claims can be written, and whether this clock is right: a worker without claims may answer nobody.

A worker tries it with a claim of its own now and then. The time that the message server stamps it with is held against this
machine's clock, by which grants, dates and the manifest are judged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from lacre.errors import LacreError
from lacre_backend.node.readiness import Reason

EVERY: Final = 10.0  # seconds between tries: 90 entries of a bucket that holds 220,000
FAILURES: Final = 2  # in a row: while NATS elects a leader, one try fails
CLOCK: Final = 60.0  # seconds at which grants begin to be refused (`lacre_fabric.work.grants.MAX_SKEW`)


class ClaimsProbe:
    """claim: writes a claim that is nobody's, and returns the server's time, if it is known. clock: this machine's. Both in
    seconds since the epoch.
    """

    def __init__(self, claim: Callable[[], Awaitable[float | None]], *, clock: Callable[[], float] = time.time) -> None:
        self._claim = claim
        self._clock = clock
        self._failures = 0
        self._failure = ""
        self._ahead = 0.0

    def reason(self) -> Reason | None:
        """What the last looks found."""
        if self._failures >= FAILURES:
            remedy = "`lacre fabric check` looks at the bucket"
            return Reason("claims", f"the pool's claims cannot be written: {self._failure}", remedy)
        if abs(self._ahead) > CLOCK:
            told = f"{abs(self._ahead):.0f} s {'ahead of' if self._ahead > 0 else 'behind'} the message server's"
            return Reason("clock", f"this machine's clock is {told}", "keep both clocks by NTP")
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
        # The stamp was made between the two: only what lies outside is the clock's fault.
        if there is not None:
            self._ahead = before - there if there < before else min(0.0, after - there)
