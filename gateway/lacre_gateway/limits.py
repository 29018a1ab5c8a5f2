"""How much a caller may ask of this process: requests at once, and requests a minute.

Rules:
- No I/O and no clock: the time comes in with the call, in seconds of any clock that does not go back.
- A refused request costs nothing: no token is taken unless all are granted.
- Memory is bounded: whoever is back at rest is forgotten.

The ceilings that a request reserves are what its grant says and what its receipt is held against.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

_MINUTE: Final = 60.0
# Subjects remembered before those at rest are looked for and forgotten.
_SWEEP_AT: Final = 4096


class LimitExceeded(Exception):
    """retry_after: seconds until the same request may pass. own: the caller's own limit, not this process's."""

    def __init__(self, retry_after: float, *, own: bool) -> None:
        super().__init__("limit exceeded")
        self.retry_after = retry_after
        self.own = own


@dataclass(frozen=True, slots=True)
class Reservation:
    """What one request may use at most, in tokens."""

    max_prompt_tokens: int
    max_tokens: int

    def covers(self, prompt_tokens: int, completion_tokens: int) -> bool:
        return prompt_tokens <= self.max_prompt_tokens and completion_tokens <= self.max_tokens


@dataclass(slots=True)
class _Account:
    """One caller. tokens: requests that may still start now (a token bucket), as it was at `updated`."""

    tokens: float
    updated: float
    running: int = 0


class RequestLimits:
    """Counts the requests of every subject in this process."""

    def __init__(self, *, in_flight: int, concurrent: int, per_minute: int) -> None:
        self._in_flight = in_flight
        self._concurrent = concurrent
        self._capacity = float(per_minute)
        self._rate = per_minute / _MINUTE
        self._accounts: dict[Hashable, _Account] = {}
        self._sweep_at = _SWEEP_AT
        self.running = 0

    @contextmanager
    def slot(self, subject: Hashable, now: float) -> Iterator[None]:
        """Holds one of the places for requests under way, from before its body is read. Raises LimitExceeded."""
        if self.running >= self._in_flight:
            raise LimitExceeded(1.0, own=False)
        account = self._account(subject, now)
        if account.running >= self._concurrent:
            raise LimitExceeded(1.0, own=True)
        self.running += 1
        account.running += 1
        try:
            yield
        finally:
            self.running -= 1
            account.running -= 1

    def reserve(self, subject: Hashable, reservation: Reservation, now: float) -> Reservation:
        """Takes the request off what the subject may start. Raises LimitExceeded."""
        account = self._account(subject, now)
        self._refill(account, now)
        if account.tokens < 1.0:
            raise LimitExceeded((1.0 - account.tokens) / self._rate, own=True)
        account.tokens -= 1.0
        return reservation

    def _account(self, subject: Hashable, now: float) -> _Account:
        account = self._accounts.get(subject)
        if account is None:
            if len(self._accounts) >= self._sweep_at:
                self._forget_those_at_rest(now)
            account = self._accounts[subject] = _Account(self._capacity, now)
        return account

    def _refill(self, account: _Account, now: float) -> None:
        account.tokens = min(self._capacity, account.tokens + max(0.0, now - account.updated) * self._rate)
        account.updated = now

    def _forget_those_at_rest(self, now: float) -> None:
        for subject, account in list(self._accounts.items()):
            self._refill(account, now)
            if account.running == 0 and account.tokens >= self._capacity:
                del self._accounts[subject]
        # Twice what is left: the next sweep comes only after as many newcomers, so a sweep costs each of them O(1).
        self._sweep_at = max(_SWEEP_AT, 2 * len(self._accounts))
