"""Whether to try again before anything was handed on, and after how long. Decides; it neither waits nor sends.

Rules:
- What certainly did not run is tried again: no connection came about, or the gateway said so (429, 503).
- What may have run is tried again only where running twice harms nobody (`lacre.inner.is_repeatable`): it is then paid for
  twice, and `attempts` tells.
- A time-out is the caller's own limit, and not stretched by trying again; one of connecting is no answer that is late.
- `Retry-After` is the least that is waited. One that asks for more patience than `PATIENCE` is the caller's to decide on.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from lacre import problems
from lacre.errors import NetworkError, TruncatedStream

FIRST: Final = 0.5  # seconds, of which a random part is waited ("full jitter"): many clients must not come back at once
LONGEST: Final = 8.0
PATIENCE: Final = 10.0  # seconds of `Retry-After` that are waited without asking

# What may have run, and did not answer.
_LOST: Final = (problems.WORKER_LOST, problems.NO_GATEWAY)
_NEVER_RAN: Final = (
    problems.RATE_LIMITED,
    problems.NO_WORKER,
    problems.BUSY,
    problems.UNAVAILABLE,
    problems.AUDIT_UNAVAILABLE,
    problems.BUDGET_UNAVAILABLE,
    problems.ISSUER_UNAVAILABLE,
    problems.NOT_READY,
    problems.OVERLOADED,
    problems.SLOW_BODY,
)


def delay(number: int, retry_after: float = 0.0) -> float:
    """Seconds to wait before the retry of this number, which counts from 1."""
    return retry_after + random.uniform(0, min(FIRST * 2 ** (number - 1), LONGEST))  # noqa: S311 - nothing secret depends on it


@dataclass(slots=True)
class Retries:
    """How often one call may still be tried again. repeatable: running it twice harms nobody."""

    left: int
    repeatable: bool
    made: int = 0

    def after_failure(self, error: NetworkError | TruncatedStream) -> float | None:
        """Seconds to wait after no answer came, or none that began; None where there is to be no retry."""
        never_ran = isinstance(error, NetworkError) and not error.reached
        late = isinstance(error, NetworkError) and error.timed_out
        may = never_ran or (self.repeatable and not late)
        return self._next() if may else None

    def after_refusal(self, problem: problems.Problem, retry_after: float | None) -> float | None:
        """Seconds to wait after the gateway would not take it; None where there is to be no retry."""
        may = problem in _NEVER_RAN or (problem in _LOST and self.repeatable)
        return self._next(retry_after or 0.0) if may and (retry_after or 0.0) <= PATIENCE else None

    def _next(self, retry_after: float = 0.0) -> float | None:
        if self.left == 0:
            return None
        self.left -= 1
        self.made += 1
        return delay(self.made, retry_after)
