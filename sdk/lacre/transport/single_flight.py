"""One request for all calls that want the same thing at the same time: a manifest, a list of keys, an access token.

Rules:
- The first call does the work. The others wait and share its outcome: also a failure, so that they do not all repeat it in
  turn.
- An error belongs to one call: each call that shares a failure gets its own error object.
- No call is bound to another's limits. A call waits no longer than its own limit, and tries by itself after a timeout that was
  shorter than its own.
- Interrupted work (a cancelled task, an interrupt) is not a failure for the others: the next call does it.
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
    """Running work. patience: seconds that its own call allows; None: no limit. done: whether it has ended.

    where: the thread or event loop that does it.
    """

    over: Event
    patience: float | None
    where: object
    done: bool = False
    error: LacreError | None = None

    def shares(self, patience: float | None) -> bool:
        """Whether a call with this patience shares its outcome. Raises the failure that it shares."""
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
        self._now = None  # a parent's thread, which does not run here

    def run(self, wanted: Callable[[], bool], work: Callable[[], None], patience: float | None = None) -> None:
        """Does the work while it is wanted, or waits for the call that does it. Raises what `work` does. patience: seconds to
        wait.
        """
        while wanted():
            with self._lock:
                flight, here = self._now, threading.get_ident()
                if flight is None or flight.where == here:  # the second case: an interrupt ended it before it began
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
    """For the tasks of an event loop. Work on another loop, which may have ended since, is ignored here."""

    def __init__(self) -> None:
        self._now: Flight[anyio.Event] | None = None
        forks.watch(self)

    def after_fork(self) -> None:
        self._now = None

    async def run(self, wanted: Callable[[], bool], work: Callable[[], Awaitable[None]], patience: float | None = None) -> None:
        """As `SingleFlight.run`."""
        from anyio import Event, move_on_after  # noqa: PLC0415 - keeps `import lacre` fast
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
    """The same error for another call, without the checks of this one."""
    copied = copy.copy(error)
    copied.verification, copied.__cause__ = None, error.__cause__
    return copied


def _at_least(patience: float | None, other: float | None) -> bool:
    return patience is None or (other is not None and patience >= other)


def _late() -> TimedOut:
    late = TimedOut("another call of this client makes the same request and has no answer yet: set a longer timeout")
    late.reached = False
    return late
