"""Whether to try again before anything was handed on, and after how long. Decides; it neither waits nor sends.

Rules:
- What certainly did not run is tried again: no connection came about, or the gateway said so (429, 503). That harms nobody and
  costs nothing, so by default it is tried for as long as a gateway, a worker or a message server takes to come back.
- What may have run is tried again only where running twice harms nobody (`lacre.exchange.request.is_repeatable`): it is then
  paid for twice, and `attempts` tells.
- What two workers were lost by is not carried to a third: whatever may have ended a worker is sealed anew once, over all of a
  call's retries and resumed answers. A sealed request reaches the model in one worker at most, so that makes two.
- A connection that broke is no worker that was lost: a gateway lives on when a worker dies, and says so by an end in order. A
  request cannot end a gateway, for to it a request is noise.
- A time-out is the caller's own limit, and not stretched by trying again; one of connecting is no answer that is late.
- `Retry-After` is the least that is waited. One that asks for more patience than `PATIENCE` is the caller's to decide on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Self

from lacre import problems
from lacre.errors import LacreError, NetworkError, TruncatedStream

FIRST: Final = 0.5  # seconds, of which a random part is waited ("full jitter"): many clients must not come back at once
LONGEST: Final = 8.0
PATIENCE: Final = 10.0  # seconds of `Retry-After` that are waited without asking

MOST_LOST: Final = 2  # workers that may be lost while they have one call: after the second it was hardly an accident
TRIES: Final = 2  # where the caller names no number: of what may have run, and is paid for again
# Seconds, where the caller names no number, in which what did not run is tried again. A cluster of message servers is without a
# leader for up to 20 s; a call that meets that must still end while somebody waits for it.
ENDURANCE: Final = 30.0
# The same for the requests that go on with a broken answer, all of them together: a further one is made while it lasts.
ENDURANCE_RESUMING: Final = 15.0
MOST: Final = 8  # tries within that time: about a call of many attempts little can be claimed where the gateway lies
NO_GATEWAY_PAUSE: Final = 1.0  # seconds; a balancer looks for another gateway about this often

# Causes of no connection that no waiting mends: the wrong port, the wrong authority.
_LASTING: Final = ("certificate", "tls", "not-tls")
# What may have run, and did not answer.
_MAY_HAVE_RUN: Final = (problems.WORKER_LOST, problems.NO_GATEWAY)
# What a worker may have been lost by.
LOST: Final = (problems.WORKER_LOST, problems.UNCLAIMED)
# What did not run because something is away or full, and comes back by itself.
_AWAY: Final = (
    problems.NO_WORKER,
    problems.BUSY,
    problems.UNAVAILABLE,
    problems.AUDIT_UNAVAILABLE,
    problems.BUDGET_UNAVAILABLE,
    problems.ISSUER_UNAVAILABLE,
    problems.NOT_READY,
    problems.OVERLOADED,
)
_NEVER_RAN: Final = (*_AWAY, problems.UNCLAIMED, problems.RATE_LIMITED, problems.SLOW_BODY)


def may_have_lost(error: LacreError) -> bool:
    """Whether it may be the end of a worker."""
    return isinstance(error, TruncatedStream) and not error.cut


def delay(number: int, retry_after: float = 0.0) -> float:
    """Seconds to wait before the retry of this number, which counts from 1."""
    return retry_after + random.uniform(0, min(FIRST * 2 ** (number - 1), LONGEST))  # noqa: S311 - nothing secret depends on it


@dataclass(slots=True)
class Retries:
    """How often one call may still be tried again.

    left: the caller's number. repeatable: running it twice harms nobody. endurance: seconds from now in which what did not run
    is tried again, `MOST` times, without being counted against that number. clock: seconds. lost: workers so far that were lost
    while they had the call, or may have been.
    """

    left: int
    repeatable: bool
    endurance: float = 0.0
    clock: Callable[[], float] = time.monotonic
    lost: int = 0
    made: int = 0
    endured: int = 0
    until: float = field(init=False)

    def __post_init__(self) -> None:
        self.until = self.clock() + self.endurance

    @classmethod
    def of(cls, number: int | None, *, repeatable: bool, endurance: float, clock: Callable[[], float], lost: int = 0) -> Self:
        """number: the caller's, who then means all tries; None for what is best."""
        if number is None:
            return cls(TRIES, repeatable, endurance, clock, lost)
        return cls(number, repeatable, lost=lost)

    @property
    def rest(self) -> float:
        """What is left of the endurance, in seconds."""
        return max(0.0, self.until - self.clock())

    def after_failure(self, error: NetworkError | TruncatedStream) -> float | None:
        """Seconds to wait after no answer came, or none that began; None where there is to be no retry."""
        never_ran = isinstance(error, NetworkError) and not error.reached
        if isinstance(error, NetworkError) and error.cause in _LASTING:
            return None
        late = isinstance(error, NetworkError) and error.timed_out
        self.lost += may_have_lost(error)
        may = (never_ran or (self.repeatable and not late)) and self.lost < MOST_LOST
        return self._next(endure=never_ran) if may else None

    def after_refusal(self, problem: problems.Problem, retry_after: float | None) -> float | None:
        """Seconds to wait after the gateway would not take it; None where there is to be no retry."""
        self.lost += problem in LOST
        may = (problem in _NEVER_RAN or (problem in _MAY_HAVE_RUN and self.repeatable)) and self.lost < MOST_LOST
        least = NO_GATEWAY_PAUSE if retry_after is None and problem is problems.NO_GATEWAY else retry_after or 0.0
        return self._next(least, endure=problem in _AWAY) if may and least <= PATIENCE else None

    def _next(self, retry_after: float = 0.0, *, endure: bool) -> float | None:
        if endure and self.endurance:
            if self.endured >= (MOST if self.rest else TRIES):
                return None
            self.endured += 1
        elif self.left:
            self.left -= 1
        else:
            return None
        self.made += 1
        return delay(self.made, retry_after)
