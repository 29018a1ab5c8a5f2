"""One request for all who want the same thing at the same time: a manifest, a list of keys, an access token.

Rules:
- Whoever comes first does the work. The others wait, and share what came of it: a failure too, so that it is not repeated by
  all of them, one after another.
- An error belongs to one call: each of those who share a failure gets an error object of its own.
- Nobody is bound to another's limits. Who waits does so no longer than its own patience, and tries by itself after a time-out
  that was tighter than its own.
- Work that was given up (a cancelled task, an interrupt) has failed nobody: the next one does it.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from lacre.errors import LacreError, NetworkError
from lacre.runtime import forks
from lacre.transport.mapped_errors import TimedOut

if TYPE_CHECKING:
    import anyio

Event = TypeVar("Event")


@dataclass(slots=True)
class Flight(Generic[Event]):
    """Work that is under way. patience: seconds that who does it has; None without a limit. done: whether it came to its end.

    where: the thread that does it, or the event loop.
    """

    over: Event
    patience: float | None
    where: object
    done: bool = False
    error: LacreError | None = None

    def shares(self, patience: float | None) -> bool:
        """Whether its outcome is also that of a call with so much patience. Raises the failure that it shares."""
        error = self.error
        if error is None:
            return self.done
        if isinstance(error, NetworkError) and error.timed_out and not _at_least(self.patience, patience):
            return False
        raise again(error)


class SingleFlight:
    """For threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now: Flight[threading.Event] | None = None
        forks.watch(self)

    def after_fork(self) -> None:
        self._lock = threading.Lock()
        self._now = None  # of a thread that is not here

    def run(self, wanted: Callable[[], bool], work: Callable[[], None], patience: float | None = None) -> None:
        """Does the work while it is wanted, or waits for who does. Raises what `work` does. patience: seconds to wait."""
        while wanted():
            with self._lock:
                flight, here = self._now, threading.get_ident()
                if flight is None or flight.where == here:  # the second: an interrupt has ended it before it began
                    mine = self._now = Flight(threading.Event(), patience, here)
                    flight = None
            if flight is None:
                return self._lead(mine, work)
            if not flight.over.wait(patience):
                raise _late()
            if flight.shares(patience):
                return None
        return None

    def _lead(self, flight: Flight[threading.Event], work: Callable[[], None]) -> None:
        try:
            work()
            flight.done = True
        except LacreError as exc:
            flight.error = again(exc)
            raise
        finally:
            with self._lock:
                if self._now is flight:
                    self._now = None
            flight.over.set()


class AsyncSingleFlight:
    """For the tasks of an event loop. Work on another loop, which may have ended since, is nobody's here."""

    def __init__(self) -> None:
        self._now: Flight[anyio.Event] | None = None
        forks.watch(self)

    def after_fork(self) -> None:
        self._now = None

    async def run(self, wanted: Callable[[], bool], work: Callable[[], Awaitable[None]], patience: float | None = None) -> None:
        """As `SingleFlight.run`."""
        from anyio import Event, move_on_after  # noqa: PLC0415 - what `import lacre` need not wait for
        from anyio.lowlevel import current_token  # noqa: PLC0415

        while wanted():
            flight, here = self._now, current_token()
            if flight is None or flight.where != here:
                mine = self._now = Flight(Event(), patience, here)
                return await self._lead(mine, work)
            with move_on_after(patience):
                await flight.over.wait()
            if not flight.over.is_set():
                raise _late()
            if flight.shares(patience):
                return None
        return None

    async def _lead(self, flight: Flight[anyio.Event], work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
            flight.done = True
        except LacreError as exc:
            flight.error = again(exc)
            raise
        finally:
            if self._now is flight:
                self._now = None
            flight.over.set()


def again(error: LacreError) -> LacreError:
    """The same error for another call: what was checked of this one is not in it."""
    copied = copy.copy(error)
    copied.verification, copied.__cause__ = None, error.__cause__
    return copied


def _at_least(patience: float | None, other: float | None) -> bool:
    return patience is None or (other is not None and patience >= other)


def _late() -> TimedOut:
    late = TimedOut("another call of this client asks the same of the network, and has no answer yet: allow a longer timeout")
    late.reached = False
    return late
