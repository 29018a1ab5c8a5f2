"""Slows down callers that keep being refused: without a valid token by address, with one by subject and by address.

Requests that are answered do not count here: the settings' limits and plans cover them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Final

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import FixedWindowRateLimiter

from lacre import problems
from lacre.runtime.listening import network_of
from lacre_gateway.http.refusal import Refusal

# Tokens of one address that are verified at a time. A token with an unknown key waits for its issuer, and there are few places
# to wait (`jwks_remote.MAX_WAITING`). An attacker who invents key ids must not take them all.
MAX_VERIFYING: Final = 64
_VERIFIED_SOON: Final = 2.0  # seconds; the gateway asks an issuer about this often
_BUCKET: Final = "failed-auth"
_MINUTE: Final = 60  # seconds


class FailureThrottle:
    """Fixed one-minute windows of failed authentications for each address."""

    def __init__(self, per_minute: int) -> None:
        self.set(per_minute)
        self._counts = FixedWindowRateLimiter(MemoryStorage())
        self._verifying: Counter[str] = Counter()

    def set(self, per_minute: int) -> None:
        """Another limit begins another count."""
        self._ceiling = per_minute
        self._limit = RateLimitItemPerMinute(per_minute)

    @contextmanager
    def verifying(self, address: str) -> Iterator[None]:
        """Around the verification of a token of the address, which may ask its issuer. Raises Refusal (429)."""
        network = network_of(address)
        if self._verifying[network] >= MAX_VERIFYING:
            raise _limited("tokens_verified_at_once", "address", MAX_VERIFYING, _VERIFIED_SOON)
        self._verifying[network] += 1
        try:
            yield
        finally:
            self._verifying[network] -= 1
            if not self._verifying[network]:
                del self._verifying[network]

    def check(self, address: str) -> None:
        """Raises Refusal (429) for an address that failed too often."""
        key = network_of(address)
        if not self._counts.test(self._limit, _BUCKET, key):
            reset = self._counts.get_window_stats(self._limit, _BUCKET, key).reset_time
            raise _limited("failed_auth_per_minute", "address", self._ceiling, reset - time.time())

    def failed(self, address: str) -> None:
        self._counts.hit(self._limit, _BUCKET, network_of(address))


class RefusalThrottle:
    """Counts refusals of callers with a valid token, in minutes of UTC, as budgets do. Used on one event loop.

    A refusal costs entries in the audit log and is charged to no budget, so it has a limit of its own. A caller past the limit
    is told to wait; such an answer is neither charged nor recorded. `report` gets their number once a minute. Memory is bounded
    by the refusals of one minute.

    per_subject, per_address: refusals a minute. clock: seconds since the epoch.
    """

    def __init__(self, per_subject: int, per_address: int, clock: Callable[[], float]) -> None:
        self.set(per_subject, per_address)
        self._clock = clock
        self.report: Callable[[int], None] = lambda _count: None
        self._window = 0
        self._counts: Counter[tuple[str, Hashable]] = Counter()
        self.unrecorded = 0  # requests of this minute that this limit refused

    def set(self, per_subject: int, per_address: int) -> None:
        self._limits = {"subject": per_subject, "address": per_address}

    def check(self, subject: Hashable, address: str) -> None:
        """subject: who asks, or who asks for what. Raises Refusal (429)."""
        self._turn()
        if not self._counts:  # nobody was refused in this minute
            return
        met = next((key[0] for key in _keys(subject, address) if self._counts[key] >= self._limits[key[0]]), None)
        if met is not None:
            self.unrecorded += 1
            name, scope = _NAMES[met]
            raise _limited(name, scope, self._limits[met], (self._window + 1) * _MINUTE - self._clock())

    def refused(self, subject: Hashable, address: str) -> None:
        """Counts one more refusal."""
        self._turn()
        self._counts.update(_keys(subject, address))

    def close(self) -> None:
        """Reports the last number."""
        if self.unrecorded:
            self.report(self.unrecorded)
            self.unrecorded = 0

    def _turn(self) -> None:
        window = int(self._clock() // _MINUTE)
        if window != self._window:
            self._window = window
            self._counts.clear()
            self.close()


# For each counter: the limit's name in the settings, and whose it is.
_NAMES: Final = {"subject": ("refused_per_minute", "user"), "address": ("refused_per_address", "address")}


def _limited(name: str, scope: str, ceiling: int, seconds: float) -> Refusal:
    return Refusal(
        problems.RATE_LIMITED,
        retry_after=seconds,
        details={"limit": name, "scope": scope, "ceiling": ceiling, "unit": "requests"},
    )


def _keys(subject: Hashable, address: str) -> tuple[tuple[str, Hashable], tuple[str, Hashable]]:
    return ("subject", subject), ("address", network_of(address))
