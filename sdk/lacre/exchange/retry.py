"""Decides whether to retry a request before any of its answer was delivered, and when. It neither waits nor sends.

Rules:
- A request that certainly did not run is retried: there was no connection, or the gateway said so (429, 503). That costs
  nothing. By default the retries last as long as a gateway, a worker or a message server needs to come back.
- A request that may have run is retried only if running it twice does no harm (`lacre.exchange.request.is_repeatable`). It is
  then paid for twice, and `attempts` shows it.
- A request that may have ended a worker is sealed again once, over all retries and resumed answers of a call. A sealed request
  reaches the model in one worker at most, so it can end two workers and no third.
- A broken connection is no lost worker. A gateway survives its workers and ends the answer properly if one dies. A request
  cannot end a gateway, because a gateway cannot read it.
- A timeout is the caller's own limit, and retries do not extend it. A timeout while connecting is not a late answer, and is
  retried.
- The client waits at least `Retry-After`. If that is more than `PATIENCE`, the caller decides.
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
PATIENCE: Final = 10.0  # seconds of `Retry-After` that the client waits without asking

MOST_LOST: Final = 2  # workers lost while they had one call: a second one is hardly an accident
TRIES: Final = 2  # default for requests that may have run, and are paid for again
# Seconds: the default time to retry a request that did not run. A cluster of message servers has no leader for up to 20 s; a
# call at that moment must still end while a person waits.
ENDURANCE: Final = 30.0
# The same for the requests that resume a broken answer, all of them together: another one is made while time is left.
ENDURANCE_RESUMING: Final = 15.0
MOST: Final = 8  # tries within that time: a lying gateway can make a call of many attempts prove little
NO_GATEWAY_PAUSE: Final = 1.0  # seconds; a balancer looks for another gateway about this often

# Causes that waiting does not cure: the wrong port, the wrong certificate authority.
_LASTING: Final = ("certificate", "tls", "not-tls")
# The request may have run, and no answer came.
_MAY_HAVE_RUN: Final = (problems.WORKER_LOST, problems.NO_GATEWAY)
# The request may have ended a worker.
LOST: Final = (problems.WORKER_LOST, problems.UNCLAIMED)
# The request did not run: something is away or full, and comes back by itself.
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
    """Whether the error may mean that a worker ended."""
    return isinstance(error, TruncatedStream) and not error.cut


def delay(number: int, retry_after: float = 0.0) -> float:
    """Seconds to wait before this retry; the first is number 1."""
    return retry_after + random.uniform(0, min(FIRST * 2 ** (number - 1), LONGEST))  # noqa: S311 - nothing secret depends on it


@dataclass(slots=True)
class Retries:
    """How often one call may still be retried.

    left: the caller's number. repeatable: running it twice does no harm. endurance: seconds from now to retry a request that
    did not run: up to `MOST` times, which do not count against `left`. clock: seconds. lost: workers that may have been lost
    while they had the call.
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
        """number: the caller's, who then means all tries; None: the default."""
        if number is None:
            return cls(TRIES, repeatable, endurance, clock, lost)
        return cls(number, repeatable, lost=lost)

    @property
    def rest(self) -> float:
        """Seconds of the endurance that are left."""
        return max(0.0, self.until - self.clock())

    def after_failure(self, error: NetworkError | TruncatedStream) -> float | None:
        """Seconds to wait after no answer came, or none began; None: do not retry."""
        never_ran = isinstance(error, NetworkError) and not error.reached
        if isinstance(error, NetworkError) and error.cause in _LASTING:
            return None
        late = isinstance(error, NetworkError) and error.timed_out
        self.lost += may_have_lost(error)
        may = (never_ran or (self.repeatable and not late)) and self.lost < MOST_LOST
        return self._next(endure=never_ran) if may else None

    def after_refusal(self, problem: problems.Problem, retry_after: float | None) -> float | None:
        """Seconds to wait after the gateway refused the request; None: do not retry."""
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
