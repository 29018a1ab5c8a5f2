"""How many requests this process runs at once, and how many of their bytes it holds: protects the process itself.

Plans limit what callers may use over all processes; see `budget`.

Rules:
- No I/O and no clock.
- Bytes are requested before they are kept.
- Memory is bounded: a caller without running requests is forgotten.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Self

from lacre.runtime.records import record

RETRY_AFTER: Final = 1.0  # seconds; there is room again as soon as a request ends


class LimitExceeded(Exception):
    """name: of the limit, as in the settings. ceiling: its value. retry_after: seconds until the same request may pass.

    own: the caller's own limit, not this process's.
    """

    def __init__(self, name: str, ceiling: int, *, own: bool) -> None:
        super().__init__(f"above {name}")
        self.name = name
        self.ceiling = ceiling
        self.retry_after = RETRY_AFTER
        self.own = own


@record(frozen=True, slots=True)
class Reservation:
    """The most that one request may use, in tokens.

    shrinks: whether fewer prompt tokens may be reserved, if so many do not fit a limit. The worker then refuses longer prompts.
    enough: the prompt tokens of ordinary text of the request's size; if that many are left of a limit, the request need not
    wait for more. None: it waits for all. least_tokens: the output that is enough, if the caller named no ceiling. None: all.
    """

    max_prompt_tokens: int
    max_tokens: int
    shrinks: bool = False
    enough: int | None = None
    least_tokens: int | None = None

    @property
    def ordinary(self) -> int:
        """As `enough`; all, if that is not known."""
        return self.max_prompt_tokens if self.enough is None else min(self.enough, self.max_prompt_tokens)

    @property
    def floor(self) -> int:
        """The least output to which it may be lowered; all, if the caller named a ceiling."""
        return self.max_tokens if self.least_tokens is None else min(self.least_tokens, self.max_tokens)

    def covers(self, prompt_tokens: int, completion_tokens: int) -> bool:
        return prompt_tokens <= self.max_prompt_tokens and completion_tokens <= self.max_tokens


class RequestLimits:
    """Counts the running requests of this process."""

    def __init__(self, *, in_flight: int, concurrent: int) -> None:
        self.set(in_flight=in_flight, concurrent=concurrent)
        self._running: dict[Hashable, int] = {}
        self.running = 0

    def set(self, *, in_flight: int, concurrent: int) -> None:
        """Running requests stay, also above a lower limit."""
        self._in_flight = in_flight
        self._concurrent = concurrent

    def slot(self, subject: Hashable) -> RunningPlace:
        """One of the places for running requests, for the time of a context, from before its body is read."""
        return RunningPlace(self, subject)

    def begin(self, subject: Hashable) -> None:
        """Raises LimitExceeded."""
        if self.running >= self._in_flight:
            raise LimitExceeded("requests_in_flight", self._in_flight, own=False)
        running = self._running.get(subject, 0)
        if running >= self._concurrent:
            raise LimitExceeded("concurrent_per_subject", self._concurrent, own=True)
        self.running += 1
        self._running[subject] = running + 1

    def end(self, subject: Hashable) -> None:
        self.running -= 1
        running = self._running[subject] - 1
        if running:
            self._running[subject] = running
        else:
            self._running.pop(subject)


class RunningPlace:
    """A context: a running request. Raises LimitExceeded if there is no place for it."""

    __slots__ = ("_limits", "_subject")

    def __init__(self, limits: RequestLimits, subject: Hashable) -> None:
        self._limits = limits
        self._subject = subject

    def __enter__(self) -> None:
        self._limits.begin(self._subject)

    def __exit__(self, *_error: object) -> None:
        self._limits.end(self._subject)


class BodyBytes:
    """Counts the bytes of bodies that this process holds, from before they are kept until they were passed on.

    total: of all callers. each: of one. A caller may also hold no more than is left for the others. So a newcomer always finds
    as much room as each of the others has.
    """

    def __init__(self, *, total: int, each: int) -> None:
        self.set(total=total, each=each)
        self._of: dict[Hashable, int] = {}
        self.held = 0

    def set(self, *, total: int, each: int) -> None:
        """Bodies that are held stay, also above a lower limit."""
        self._total = total
        self._each = each

    def room(self, subject: Hashable) -> BodyReservation:
        """For one request's body."""
        return BodyReservation(self, subject)

    def check(self, subject: Hashable, size: int) -> None:
        """Raises LimitExceeded if this many more bytes do not fit."""
        whole = self._of.get(subject, 0) + size
        if whole > self._each:
            raise LimitExceeded("body_bytes_per_subject", self._each, own=True)
        if whole > self._total - self.held:
            raise LimitExceeded("body_bytes", self._total, own=False)

    def add(self, subject: Hashable, size: int) -> None:
        """size: negative to give bytes back."""
        self.held += size
        whole = self._of.get(subject, 0) + size
        if whole:
            self._of[subject] = whole
        else:
            self._of.pop(subject, None)


class BodyReservation:
    """Counts the bytes of one body. size: how many there are. A context: at its end they are given back, if not before."""

    def __init__(self, budget: BodyBytes, subject: Hashable) -> None:
        self._budget = budget
        self._subject = subject
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.release()

    def check(self, size: int) -> None:
        """Raises LimitExceeded if this many more bytes would not fit now. Takes nothing."""
        self._budget.check(self._subject, size)

    def take(self, size: int) -> None:
        """Raises LimitExceeded."""
        self._budget.check(self._subject, size)
        self._budget.add(self._subject, size)
        self.size += size

    def release(self) -> None:
        """Gives all of it back. Idempotent."""
        if self.size:
            self._budget.add(self._subject, -self.size)
            self.size = 0
