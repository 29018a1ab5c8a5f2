"""How many requests this process has under way at once, of one caller and of all: what protects the process itself.

What callers may use by their plans, over all processes, is for `budget`.

Rules:
- No I/O and no clock.
- Memory is bounded: whoever has nothing under way is forgotten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

RETRY_AFTER: Final = 1.0  # seconds; requests end all the time


class LimitExceeded(Exception):
    """retry_after: seconds until the same request may pass. own: the caller's own limit, not this process's."""

    def __init__(self, *, own: bool) -> None:
        super().__init__("limit exceeded")
        self.retry_after = RETRY_AFTER
        self.own = own


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one request may use at most, in tokens."""

    max_prompt_tokens: int
    max_tokens: int

    def covers(self, prompt_tokens: int, completion_tokens: int) -> bool:
        return prompt_tokens <= self.max_prompt_tokens and completion_tokens <= self.max_tokens


class RequestLimits:
    """Counts the requests under way in this process."""

    def __init__(self, *, in_flight: int, concurrent: int) -> None:
        self._in_flight = in_flight
        self._concurrent = concurrent
        self._running: Counter[Hashable] = Counter()
        self.running = 0

    @contextmanager
    def slot(self, subject: Hashable) -> Iterator[None]:
        """Holds one of the places for requests under way, from before its body is read. Raises LimitExceeded."""
        if self.running >= self._in_flight:
            raise LimitExceeded(own=False)
        if self._running[subject] >= self._concurrent:
            raise LimitExceeded(own=True)
        self.running += 1
        self._running[subject] += 1
        try:
            yield
        finally:
            self.running -= 1
            self._running[subject] -= 1
            if not self._running[subject]:
                del self._running[subject]
