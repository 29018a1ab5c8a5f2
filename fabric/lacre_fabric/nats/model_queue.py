"""A worker's view of one model's queue: whether it counts as missing.

Rules:
- One pull without an answer does not make a queue missing. While a NATS server reads new accounts, nothing answers for some
  milliseconds; a queue that lost its leader gets another one within nine seconds.
- Gateways hold requests for as long (`LEADERLESS`). A worker that stopped announcing its model sooner would have them refused.
- A queue that never answered is missing at once.
- A queue is quiet if pulls have waited for `QUIET` seconds, one after the other, and got nothing. NATS answers a pull from a
  queue that has work much sooner.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from nats.js.client import JetStreamContext

from lacre_fabric.work.contract import LEADERLESS

MISSING_AFTER: Final = LEADERLESS
NO_ANSWER: Final = 0.1  # seconds between pulls until then: a reload takes less
QUIET: Final = 0.1  # seconds; also the longest pause between two pulls that count as one
NO_QUEUE: Final = 1.0  # seconds between looks for a missing queue


@dataclass(slots=True)
class ModelQueue:
    """there: whether it counts as existing, so that the worker announces its model.

    silent_since: when it stopped answering, on the monotonic clock; infinite while it answers. pulled_since, empty_at: when its
    pulls began to wait, and when the last one ended with nothing. filled: whether offered work took the last slot meanwhile.
    """

    model: str
    pull: JetStreamContext.PullSubscription
    there: bool = True
    silent_since: float = -math.inf
    pulled_since: float = math.inf
    empty_at: float = -math.inf
    filled: bool = False

    def pulling(self, now: float) -> None:
        self.filled = False
        if now > self.empty_at + QUIET or self.pulled_since == math.inf:
            self.pulled_since = now

    def empty(self, now: float) -> None:
        """A pull ended with nothing."""
        self.empty_at = now

    def brought(self) -> None:
        """A pull brought work: there may be more."""
        self.unknown()

    def unknown(self) -> None:
        """Nothing is known of it: nothing answered a pull, or the connection that a pull waited on is gone."""
        self.pulled_since, self.empty_at = math.inf, -math.inf

    def quiet(self, now: float, *, waits: bool) -> bool:
        """Whether it has no work. waits: whether a pull waits now; if not, one may just have ended with nothing."""
        return now - self.pulled_since >= QUIET and (waits or now - self.empty_at < QUIET)

    def answered(self) -> None:
        self.there, self.silent_since = True, math.inf

    def silent(self, now: float) -> None:
        """NATS says that nothing listens for pulls."""
        self.unknown()
        self.silent_since = min(self.silent_since, now)
        self.there = now - self.silent_since < MISSING_AFTER

    @property
    def pause(self) -> float:
        """Seconds until the next pull after one without an answer."""
        return NO_ANSWER if self.there else NO_QUEUE
