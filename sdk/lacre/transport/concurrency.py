"""How many requests a client has on their way at once (`max_concurrency`): the others wait for their turn, in their order.

Rules:
- A request holds its slot until its answer was read to the end, or was left. A stream that stays open holds one.
- Who waits and gives up, by a cancellation or Ctrl-C, takes no slot along, and passes on one that came meanwhile.
- Waiting has no limit of its own: it is what the caller asked for. A time limit of the request begins when it is sent.
- A forked child begins with all slots free. Async clients count in each event loop by itself.
"""

from __future__ import annotations

import threading
from collections import deque
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from lacre.runtime.forks import Home

if TYPE_CHECKING:
    import anyio


class _Turns(Protocol):
    def give(self) -> None: ...


class Slot:
    """One request's. turns: where it came from; None where nothing is counted."""

    __slots__ = ("_home", "_turns")

    def __init__(self, turns: _Turns | None = None) -> None:
        self._turns = turns
        self._home = Home()

    def leave(self) -> None:
        """Gives it to whoever waits longest. A second time does nothing, and so in a forked child."""
        turns, self._turns = self._turns, None
        if turns is not None and self._home:
            turns.give()


class Turns:
    """The slots of a sync client. Thread-safe.

    A slot may be left by a signal handler, or by the destructor of a stream: they run between any two steps of a thread, of
    `take` too, and must not wait for its lock.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: deque[threading.Event] = deque()
        self._lock = threading.Lock()
        self._given: SimpleQueue[None] = SimpleQueue()  # its `put` may interrupt itself

    def take(self) -> Slot:
        """Waits for a slot."""
        mine = threading.Event()
        try:
            with self._lock:
                if self._free and not self._waiting:
                    self._free -= 1
                    mine.set()
                else:
                    self._waiting.append(mine)
            self._settle()
            mine.wait()
        except BaseException:
            self._withdraw(mine)
            raise
        return Slot(self)

    def _withdraw(self, mine: threading.Event) -> None:
        with self._lock:
            if mine in self._waiting:
                self._waiting.remove(mine)
            elif mine.is_set():
                self._given.put(None)
        self._settle()

    def give(self) -> None:
        self._given.put(None)
        self._settle()

    def _settle(self) -> None:
        """Hands on what was given. Who holds the lock now does this when it has let go of it."""
        while not self._given.empty() and self._lock.acquire(blocking=False):
            try:
                self._hand_on()
            finally:
                self._lock.release()

    def _hand_on(self) -> None:
        with suppress(Empty):
            while True:
                self._given.get_nowait()
                if self._waiting:
                    self._waiting.popleft().set()
                else:
                    self._free += 1


class AsyncTurns:
    """The slots of an async client in one event loop."""

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: deque[anyio.Event] = deque()

    async def take(self) -> Slot:
        """Waits for a slot."""
        if self._free and not self._waiting:
            self._free -= 1
            return Slot(self)
        from anyio import Event  # noqa: PLC0415 - what `import lacre` need not wait for

        mine = Event()
        self._waiting.append(mine)
        try:
            await mine.wait()
        except BaseException:
            if mine.is_set():
                self.give()
            else:
                self._waiting.remove(mine)
            raise
        return Slot(self)

    def give(self) -> None:
        if self._waiting:
            self._waiting.popleft().set()
        else:
            self._free += 1
